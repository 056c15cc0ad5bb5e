//! Memory for what waits here: messages that are not whole yet, those for clients that are behind, answers of batches, ids. It is the process's, of
//! which all else is a client's own.

use bytes::Bytes;

use crate::admission::{Admission, Extra};

/// Bytes of what one keeps that it need not ask for: a client's own memory is for these.
pub(super) const FREE: usize = 16 << 10;

/// Beyond that, bytes that are taken at once.
pub(super) const PORTION: usize = 64 << 10;

/// What one of those who keep something has taken. Given back with it.
#[derive(Debug)]
pub(super) struct Memory {
    admission: Admission,
    portions: Vec<Extra>,
}

/// See [`Memory::whole`].
struct Whole {
    message: Bytes,
    _memory: Extra,
}

impl Memory {
    /// Nothing is taken.
    pub(super) fn new(admission: &Admission) -> Self {
        Self { admission: admission.clone(), portions: Vec::new() }
    }

    /// Takes what is missing for so many bytes, and gives back what is not needed for them. False: there is not enough.
    pub(super) fn fit(&mut self, bytes: usize) -> bool {
        let wanted = bytes.saturating_sub(FREE).div_ceil(PORTION);
        if wanted == 0 {
            self.portions = Vec::new();
        }
        self.portions.truncate(wanted);
        while self.portions.len() < wanted {
            let Some(portion) = self.admission.more_memory(PORTION as u64) else { return false };
            self.portions.push(portion);
        }
        true
    }

    /// All that was taken, for whoever keeps it from now on.
    pub(super) fn take(&mut self) -> Self {
        Self { admission: self.admission.clone(), portions: std::mem::take(&mut self.portions) }
    }

    /// Has what was taken for something that is kept here from now on.
    pub(super) fn absorb(&mut self, mut other: Self) {
        self.portions.append(&mut other.portions);
    }

    /// Bytes that it is enough for.
    pub(super) fn bytes(&self) -> usize {
        FREE + self.portions.len() * PORTION
    }

    /// Takes what one message needs that many have, for as long as anybody has a part of it. `None`: there is not enough.
    pub(super) fn whole(&self, message: &Bytes) -> Option<Bytes> {
        let memory = self.admission.more_memory(message.len() as u64)?;
        Some(Bytes::from_owner(Whole { message: message.clone(), _memory: memory }))
    }
}

impl AsRef<[u8]> for Whole {
    fn as_ref(&self) -> &[u8] {
        &self.message
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::admission::{Capacity, Reason};

    /// Who has so many bytes to give; `None`: any number.
    pub(in crate::hub) fn budget(memory: Option<usize>) -> Admission {
        let (connections, turned_away, full) = (1, 1, Reason::MaxConnections);
        let memory = memory.map(|bytes| bytes as u64);
        let capacity = Capacity { connections, turned_away, memory, connection_bytes: 0, full };
        Admission::new(capacity, &crate::config::Settings::default().limits)
    }

    /// Whatever is kept, as much is taken as it needs, in portions, and given back with it; of a message that many have, once. Method: a
    /// budget of three portions.
    #[test]
    fn as_much_is_taken_as_is_kept() {
        let admission = budget(Some(3 * PORTION));
        let taken = || admission.memory().expect("a budget").0;
        let mut memory = Memory::new(&admission);
        for (bytes, portions) in [(0, 0), (FREE, 0), (FREE + 1, 1), (FREE + 2 * PORTION, 2), (FREE + 1, 1), (9, 0)] {
            assert!(memory.fit(bytes), "{bytes}");
            assert_eq!((taken(), memory.bytes()), ((portions * PORTION) as u64, FREE + portions * PORTION), "{bytes}");
        }
        let message = Bytes::from(vec![7; PORTION + 1]);
        let one = memory.whole(&message).expect("room");
        let part = one.slice(PORTION..);
        assert_eq!((&one[..], taken()), (&message[..], PORTION as u64 + 1));
        drop(one);
        assert!(!memory.fit(FREE + 2 * PORTION) && memory.fit(FREE + PORTION));
        assert!(memory.whole(&message).is_none());
        drop(part);
        assert!(memory.fit(FREE + 3 * PORTION) && !memory.fit(FREE + 4 * PORTION));
        // What goes on to somebody else is not given back meanwhile.
        let mut other = Memory::new(&admission);
        other.absorb(memory.take());
        assert_eq!((memory.bytes(), other.bytes(), taken()), (FREE, FREE + 3 * PORTION, 3 * PORTION as u64));
        drop(memory);
        drop(other);
        assert_eq!(taken(), 0);
    }
}
