//! tidegate with an allocator that counts, for .ci/guard.
//!
//! Not a target of Cargo's: rustc links it against the library of the release build, so nothing is compiled a second time, and what is
//! counted is the code that is shipped. The allocator below is the system's: what is asked of it is the same for any.
//!
//! For each byte on stdin there is a line on stderr: how often memory was asked for until now (a block that grows counts too), and how
//! many bytes are held.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    io::{Read as _, Write as _},
    process::ExitCode,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    thread,
};

#[global_allocator]
static COUNTING: Counting = Counting;

static ASKED: AtomicUsize = AtomicUsize::new(0);
static HELD: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: all is the system's allocator's, with the same arguments; the counters allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ASKED.fetch_add(1, Relaxed);
        HELD.fetch_add(layout.size(), Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        ASKED.fetch_add(1, Relaxed);
        HELD.fetch_add(layout.size(), Relaxed);
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ASKED.fetch_add(1, Relaxed);
        HELD.fetch_add(size, Relaxed);
        HELD.fetch_sub(layout.size(), Relaxed);
        unsafe { System.realloc(block, layout, size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(block, layout) }
    }
}

fn main() -> ExitCode {
    thread::spawn(|| {
        let (mut asked, mut told) = (std::io::stdin(), std::io::stderr());
        let mut byte = [0];
        while asked.read_exact(&mut byte).is_ok() {
            let (count, bytes) = (ASKED.load(Relaxed), HELD.load(Relaxed));
            if writeln!(told, "counted {count} {bytes}").and_then(|()| told.flush()).is_err() {
                break;
            }
        }
    });
    tidegate::cli::main()
}
