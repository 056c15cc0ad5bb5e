//! A relay that looks at nothing: one thread, one epoll, bytes from one socket to the other, a FIN for a FIN. What a proxy costs at
//! least that goes through user space; it knows neither HTTP nor WebSocket, and has no limits, timeouts or log.
//!
//! A session that is silent is two sockets and a few words. Bytes that a peer does not take are kept, and the side that they came from is not read
//! until they are gone.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
};

use rustix::{
    buffer::spare_capacity,
    event::epoll::{self, CreateFlags, Event, EventData, EventFlags},
    fd::OwnedFd,
    io::Errno,
};
use slab::Slab;
use socket2::{Domain, Socket, Type};

/// A read at once; as much as tidegate takes.
const SCRATCH_BYTES: usize = 64 * 1024;

const EVENTS: usize = 1024;
const BACKLOG: i32 = 65_535;

/// Of the listener, beyond all sessions.
const LISTENER: u64 = u64::MAX;

#[derive(Debug, clap::Args)]
pub struct Options {
    #[arg(long)]
    address: SocketAddr,
    #[arg(long)]
    backend: SocketAddr,
}

/// The client's and the backend's.
#[derive(Debug)]
struct Session {
    sides: [Side; 2],
    /// Its sockets are closed when all events of this round were seen: until then nobody else has its number.
    is_over: bool,
}

#[derive(Debug)]
struct Side {
    socket: TcpStream,
    /// For this socket, which did not take them yet.
    kept: Vec<u8>,
    /// Its FIN has come.
    is_read: bool,
    asked: EventFlags,
}

pub fn main(options: &Options) -> anyhow::Result<()> {
    let socket = Socket::new(Domain::for_address(options.address), Type::STREAM, None)?;
    socket.bind(&options.address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    let listener = TcpListener::from(socket);
    let poll = epoll::create(CreateFlags::CLOEXEC)?;
    epoll::add(&poll, &listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
    writeln!(io::stdout(), "{}", listener.local_addr()?)?;

    let mut sessions: Slab<Session> = Slab::new();
    let mut events: Vec<Event> = Vec::with_capacity(EVENTS);
    let mut scratch = vec![0; SCRATCH_BYTES];
    let mut over = Vec::new();
    loop {
        match epoll::wait(&poll, spare_capacity(&mut events), None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        for event in events.drain(..) {
            let token = event.data.u64();
            if token == LISTENER {
                while let Ok((client, _)) = listener.accept() {
                    // Whoever can't be served is closed.
                    let _ = begin(&poll, &mut sessions, client, options.backend);
                }
                continue;
            }
            let (number, from) = (usize::try_from(token / 2)?, usize::from(token % 2 == 1));
            let Some(session) = sessions.get_mut(number).filter(|session| !session.is_over) else { continue };
            let flags = event.flags;
            if session.step(&poll, number, from, flags, &mut scratch).is_err() || session.is_ended() {
                session.is_over = true;
                over.push(number);
            }
        }
        for number in over.drain(..) {
            sessions.remove(number);
        }
    }
}

fn token(number: usize, side: usize) -> EventData {
    EventData::new_u64((number * 2 + side) as u64)
}

fn begin(poll: &OwnedFd, sessions: &mut Slab<Session>, client: TcpStream, address: SocketAddr) -> anyhow::Result<()> {
    client.set_nonblocking(true)?;
    let backend = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), None)?;
    match backend.connect(&address.into()) {
        Err(error) if error.raw_os_error() != Some(Errno::INPROGRESS.raw_os_error()) => return Err(error.into()),
        // What is written before it is connected is kept.
        _ => {}
    }
    let sides =
        [client, backend.into()].map(|socket| Side { socket, kept: Vec::new(), is_read: false, asked: EventFlags::IN });
    let slot = sessions.vacant_entry();
    for (nth, side) in sides.iter().enumerate() {
        side.socket.set_nodelay(true)?;
        epoll::add(poll, &side.socket, token(slot.key(), nth), side.asked)?;
    }
    slot.insert(Session { sides, is_over: false });
    Ok(())
}

impl Session {
    /// What can be done now that there is something about one side.
    fn step(
        &mut self,
        poll: &OwnedFd,
        number: usize,
        from: usize,
        flags: EventFlags,
        scratch: &mut [u8],
    ) -> io::Result<()> {
        let [first, second] = &mut self.sides;
        let (here, there) = if from == 0 { (first, second) } else { (second, first) };
        if flags.contains(EventFlags::OUT) && !here.kept.is_empty() {
            here.flush()?;
            if here.kept.is_empty() && there.is_read {
                here.socket.shutdown(Shutdown::Write)?;
            }
        }
        let is_broken = flags.intersects(EventFlags::ERR | EventFlags::HUP);
        if flags.contains(EventFlags::IN) && !here.is_read && there.kept.is_empty() {
            match here.socket.read(scratch) {
                Ok(0) => {
                    here.is_read = true;
                    there.socket.shutdown(Shutdown::Write)?;
                }
                Ok(length) => there.write(&scratch[..length])?,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        } else if is_broken {
            // Nobody would ask what has become of it.
            return Err(ErrorKind::ConnectionAborted.into());
        }
        for (nth, kept_there) in [(0, !self.sides[1].kept.is_empty()), (1, !self.sides[0].kept.is_empty())] {
            let side = &mut self.sides[nth];
            let mut wanted = EventFlags::empty();
            wanted.set(EventFlags::IN, !side.is_read && !kept_there);
            wanted.set(EventFlags::OUT, !side.kept.is_empty());
            if wanted != side.asked {
                epoll::modify(poll, &side.socket, token(number, nth), wanted)?;
                side.asked = wanted;
            }
        }
        Ok(())
    }

    fn is_ended(&self) -> bool {
        self.sides.iter().all(|side| side.is_read && side.kept.is_empty())
    }
}

impl Side {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let written = match self.socket.write(bytes) {
            Ok(written) => written,
            Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
            Err(error) => return Err(error),
        };
        self.kept.extend(&bytes[written..]);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let written = match self.socket.write(&self.kept) {
            Ok(written) => written,
            Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
            Err(error) => return Err(error),
        };
        self.kept.drain(..written);
        if self.kept.is_empty() {
            // A session that is silent has no buffer.
            self.kept = Vec::new();
        }
        Ok(())
    }
}
