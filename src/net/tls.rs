//! TLS over a socket, on either side of it: what goes through is encrypted, and nothing else is different about the leg.
//!
//! - What was taken is in the kernel: rustls keeps nothing that was written, so that whoever waits for a slow reader, or says that
//!   something is sent, is as right as with a bare socket.
//! - A FIN is a FIN, whether `close_notify` came before it or not. What that protects from, an end that somebody else made, is seen
//!   by whoever counts frames, or the bytes of a body.
//! - At its end `close_notify` goes out, and then it is a socket like any other, with the same last wait.
//!
//! Who we are and whom we believe is in `tls/files.rs`, how it begins in `tls/handshake.rs`. Not here: which files are used (`downstream/tls.rs`,
//! `upstream/tls.rs`), what backends are asked for (`upstream/`), how long a client's handshake may take (`session/`), and a way around verification.

mod files;
mod handshake;

use std::{
    cell::RefCell,
    error::Error,
    fmt, io,
    io::BufRead as _,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use rustix::net::{SendFlags, send};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::{
    TlsStream,
    rustls::{self, ConnectionCommon, HandshakeKind, ProtocolVersion, SideData},
};

pub use self::{
    files::{TLS_FILE_BYTES, TlsClient, TlsFile, TlsFileError, TlsServer, is_server_name},
    handshake::{Accepting, encrypt},
};
use super::{Last, Stream, identity::identity};

/// What is encrypted at once: the plaintext of one record (RFC 8446 5.1).
const RECORD: usize = 16 * 1024;

/// The most that is before a frame's payload, which is often as long as a record's plaintext: WebSocket's (RFC 6455 5.2); of HTTP/2 it is 9.
const FRAME_HEADER: usize = 14;

/// Of what is written at once: what h2 has waiting, and a frame's payload, and some to spare.
const PIECES: usize = 4;

/// What rustls may have waiting to be sent: a record, or a frame with a payload as long. More is never given to it.
const BUFFER: usize = 2 * RECORD;

/// What is read in one look, whatever comes: others of the same thread have their turn. More than the largest record (RFC 5246 6.2.3).
const TURN_BYTES: usize = 20 << 10;

/// The same behind a look that was mostly data: that costs by its bytes, and not by the number of its records. What a relay reads of a bare
/// socket, in four records.
const BULK_BYTES: usize = 66 << 10;

/// What rustls is given of it at once.
const PIECE: usize = 4 << 10;

/// Records that one key of AES-GCM is good for in TLS 1.2, which has no key updates; less some for the end (ring, as RFC 8446 5.5 counts).
const MOST_RECORDS: u64 = (1 << 24) - 1024;

/// What is read beyond the room that its reader has, since not all of it is data.
const MORE: usize = 4 << 10;

/// What may come without any of the other side's data in it. Only somebody who wants to keep us busy sends more, or have it kept: key
/// updates, empty records, pieces of a handshake that does not go on.
const QUIET_BYTES: usize = 24 << 10;

thread_local! {
    /// Where ciphertext lies on its way from the kernel to rustls, within one call.
    static CIPHERTEXT: RefCell<Vec<u8>> = RefCell::new(vec![0; BULK_BYTES]);
}

/// A leg that is encrypted.
#[derive(Debug)]
pub struct Tls {
    stream: TlsStream<Raw>,
    /// Bytes that were encrypted and whose writer was not told so, since not all of them are in the kernel. It comes again with the
    /// same bytes.
    owed: usize,
    /// That were encrypted.
    records: u64,
    /// Why nothing more can be read or written, though the socket may be as it should.
    broken: Option<rustls::Error>,
    /// The client was asked for a certificate.
    asks: bool,
}

/// The socket below. While a handshake is under way it comes back when it is dropped.
struct Raw {
    /// `None` only when it was given back.
    stream: Option<Stream>,
    /// What was read of it before.
    early: Bytes,
    /// What may be read before others have their turn.
    turn: usize,
    /// ... of the next look.
    look: usize,
    /// Bytes that were read since data came.
    quiet: usize,
    back: Option<Arc<Back>>,
}

/// What is known of a socket while a handshake has it.
#[derive(Default)]
struct Back {
    stream: Mutex<Option<Stream>>,
    /// Bytes that were read.
    count: AtomicUsize,
}

impl Back {
    fn take(&self) -> Option<Stream> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// What was agreed on with a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Secured {
    /// As logs have it.
    pub version: &'static str,
    /// Who it wanted to speak with (SNI): letters, digits and `-_.` only, 253 at most.
    pub name: Option<Box<str>>,
    /// It showed a ticket of an earlier session.
    pub is_resumed: bool,
    /// Who it is by its certificate.
    pub certificate: ClientCertificate,
}

/// What a client was asked for, and has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientCertificate {
    /// It was not asked.
    NotAsked,
    /// It has none.
    Missing,
    /// Its names, as `X-Forwarded-Client-Cert` has them: letters, digits and signs of ASCII alone, 4 KiB at most.
    Verified(Box<str>),
}

/// What TLS itself has to say in an error; `None`: it is about something else.
pub fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<rustls::Error>() {
            return Some(found);
        }
        // An io::Error leaves out what it wraps itself.
        next = match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

impl Tls {
    fn of(stream: TlsStream<Raw>, asks: bool) -> Stream {
        Stream::Tls(Box::new(Self { stream, owed: 0, records: 0, broken: None, asks }))
    }

    /// What was agreed on; `None`: not as a server.
    pub(super) fn secured(&self) -> Option<Secured> {
        let TlsStream::Server(stream) = &self.stream else { return None };
        let session = stream.get_ref().1;
        let version = match session.protocol_version() {
            Some(ProtocolVersion::TLSv1_2) => "1.2",
            Some(ProtocolVersion::TLSv1_3) => "1.3",
            _ => "other",
        };
        let name = session.server_name().map(Box::from);
        let certificate = match session.peer_certificates().and_then(<[_]>::first) {
            Some(own) => ClientCertificate::Verified(identity(own)),
            None if self.asks => ClientCertificate::Missing,
            None => ClientCertificate::NotAsked,
        };
        let is_resumed = session.handshake_kind() == Some(HandshakeKind::Resumed);
        Some(Secured { version, name, is_resumed, certificate })
    }

    fn raw(&mut self) -> &mut Raw {
        match &mut self.stream {
            TlsStream::Client(stream) => stream.get_mut().0,
            TlsStream::Server(stream) => stream.get_mut().0,
        }
    }

    /// What it goes through.
    pub(super) fn below(&self) -> Option<&Stream> {
        self.stream.get_ref().0.stream.as_ref()
    }

    /// What both sides have agreed to use it for (ALPN).
    pub fn protocol(&self) -> Option<&[u8]> {
        self.stream.get_ref().1.alpn_protocol()
    }

    /// Behind what it has not sent yet `close_notify` goes out, as far as the kernel takes it; what it does not is left for the last
    /// wait, a record at most.
    ///
    /// "Each party MUST send a `close_notify` alert before closing its write side of the connection, unless it has already sent some
    /// error alert" (RFC 8446 6.1).
    pub(super) fn into_last(self) -> io::Result<Last> {
        let (mut raw, mut session) = match self.stream {
            TlsStream::Client(stream) => {
                let (raw, session) = stream.into_inner();
                (raw, rustls::Connection::from(session))
            }
            TlsStream::Server(stream) => {
                let (raw, session) = stream.into_inner();
                (raw, rustls::Connection::from(session))
            }
        };
        session.send_close_notify();
        let mut unsent = Vec::new();
        while session.wants_write() {
            session.write_tls(&mut unsent)?;
        }
        let stream = raw.stream.take().ok_or(io::ErrorKind::NotConnected)?;
        Ok(match stream.into_last()? {
            Last::Socket { socket, .. } => Last::Socket { unsent: send_some(&socket, unsent.into()), socket },
            other @ (Last::Tunnel(_) | Last::Nothing) => other,
        })
    }

    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        if let Some(broken) = &self.broken {
            // What came before, and had no room.
            let drained = match &mut self.stream {
                TlsStream::Client(stream) => drain(stream.get_mut().1, buffer),
                TlsStream::Server(stream) => drain(stream.get_mut().1, buffer),
            };
            if drained.is_ok() && buffer.filled().len() > before {
                return Poll::Ready(Ok(()));
            }
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, broken.clone())));
        }
        let raw = self.raw();
        raw.turn = raw.look;
        let read = match &mut self.stream {
            TlsStream::Client(stream) => {
                let (raw, session) = stream.get_mut();
                poll_decrypted(raw, session, cx, buffer)
            }
            TlsStream::Server(stream) => {
                let (raw, session) = stream.get_mut();
                poll_decrypted(raw, session, cx, buffer)
            }
        };
        if buffer.filled().len() > before {
            self.raw().quiet = 0;
            // What came before it is good. It is said with the next look.
            if let Poll::Ready(Err(error)) = &read {
                let told = || rustls::Error::General(error.to_string());
                self.broken = Some(tls_error(error).cloned().unwrap_or_else(told));
                self.tell(cx);
            }
            return Poll::Ready(Ok(()));
        } else if self.raw().quiet > QUIET_BYTES {
            let error = rustls::Error::General("nothing but TLS's own comes".to_owned());
            self.broken = Some(error.clone());
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, error)));
        }
        let Err(error) = ready!(read) else { return Poll::Ready(Ok(())) };
        // A FIN without close_notify.
        if error.kind() == io::ErrorKind::UnexpectedEof {
            return Poll::Ready(Ok(()));
        }
        // rustls says it once.
        self.broken = tls_error(&error).cloned();
        if self.broken.is_some() {
            self.tell(cx);
        }
        Poll::Ready(Err(error))
    }

    /// An alert may be waiting, for a peer that is still there to have it.
    fn tell(&mut self, cx: &mut Context<'_>) {
        match &mut self.stream {
            TlsStream::Client(stream) => {
                let (raw, session) = stream.get_mut();
                send_waiting(raw, session, cx);
            }
            TlsStream::Server(stream) => {
                let (raw, session) = stream.get_mut();
                send_waiting(raw, session, cx);
            }
        }
    }

    /// It is of no more use: what goes wrong with it is TLS's, not the socket's.
    pub(super) const fn is_broken(&self) -> bool {
        self.broken.is_some()
    }

    /// rustls would take what is written from then on for sent, and send none of it.
    fn is_worn(&self) -> bool {
        self.records >= MOST_RECORDS && self.stream.get_ref().1.protocol_version() == Some(ProtocolVersion::TLSv1_2)
    }

    /// Takes a record at most, or a frame with a payload as long. Whoever gets `Pending` is to come again with the same bytes, more may be behind them.
    pub(super) fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let most = if bytes.len() <= RECORD + FRAME_HEADER { bytes.len() } else { RECORD };
        self.poll_taken(cx, bytes.len(), |stream, cx| stream.poll_write(cx, &bytes[..most]))
    }

    /// The same with pieces: a frame's header and its payload are one write, and mostly one record.
    pub(super) fn poll_write_vectored(
        &mut self,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut some = [io::IoSlice::new(&[]); PIECES];
        let (mut count, mut left) = (0, RECORD + FRAME_HEADER);
        for piece in pieces.iter().filter(|piece| !piece.is_empty()).take(PIECES) {
            let piece = &piece[..piece.len().min(left)];
            some[count] = io::IoSlice::new(piece);
            (count, left) = (count + 1, left - piece.len());
            if left == 0 {
                break;
            }
        }
        let length = pieces.iter().map(|piece| piece.len()).sum();
        self.poll_taken(cx, length, |stream, cx| stream.poll_write_vectored(cx, &some[..count]))
    }

    /// What `write` takes is in the kernel, or it is `Pending`. `length`: of all that is there, which `write` may take a part of.
    fn poll_taken(
        &mut self,
        cx: &mut Context<'_>,
        length: usize,
        write: impl FnOnce(Pin<&mut TlsStream<Raw>>, &mut Context<'_>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if self.broken.is_some() {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if self.owed == 0 {
            if self.is_worn() {
                self.broken = Some(rustls::Error::General("TLS 1.2 has no keys for more records".to_owned()));
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            self.owed = ready!(write(Pin::new(&mut self.stream), cx))?;
            self.records += self.owed.div_ceil(RECORD) as u64;
        }
        debug_assert!(length >= self.owed, "not the bytes that were written before");
        ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
        Poll::Ready(Ok(std::mem::take(&mut self.owed).min(length)))
    }

    pub(super) fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// What has come and is not in `buffer` yet, or else what comes: one read, for as much as fits, where rustls by itself has 4 KiB in
/// each. What is filled when there is an error came before that.
fn poll_decrypted<D: SideData>(
    raw: &mut Raw,
    session: &mut ConnectionCommon<D>,
    cx: &mut Context<'_>,
    buffer: &mut ReadBuf<'_>,
) -> Poll<io::Result<()>> {
    let before = buffer.filled().len();
    loop {
        let is_over = drain(session, buffer)?;
        if is_over || buffer.filled().len() > before || buffer.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let most = (buffer.remaining() + MORE).min(raw.turn);
        ready!(CIPHERTEXT.with_borrow_mut(|landing| {
            let mut landed = ReadBuf::new(&mut landing[..most]);
            let Poll::Ready(read) = Pin::new(&mut *raw).poll_read(cx, &mut landed) else {
                // rustls gives the room of the last records back when it is asked to read more, and not before: who is silent needs none.
                let _ = session.read_tls(&mut Nothing);
                return Poll::Pending;
            };
            read?;
            let mut bytes = landed.filled();
            let all = bytes.len();
            raw.look = TURN_BYTES;
            loop {
                // Nothing at all is its end. What is behind close_notify is not taken.
                // rustls decrypts all that it is given, and keeps a place for each record of it: so little at a time.
                let mut piece = &bytes[..bytes.len().min(PIECE)];
                let count = session.read_tls(&mut piece)?;
                bytes = &bytes[count..];
                let processed = session.process_new_packets();
                drain(session, buffer)?;
                if let Err(error) = processed {
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, error)));
                }
                let (taken, data) = (all - bytes.len(), buffer.filled().len() - before);
                let is_mostly_data = data > taken / 16 * 15;
                if count == 0 || bytes.is_empty() {
                    if is_mostly_data && all >= TURN_BYTES {
                        raw.look = BULK_BYTES;
                    }
                    return Poll::Ready(io::Result::Ok(()));
                }
                // rustls has no room for more than a record that nobody takes; and many small ones are enough of them.
                let is_left = session.reader().fill_buf().is_ok_and(|left| !left.is_empty());
                if is_left || (taken >= TURN_BYTES && !is_mostly_data) {
                    raw.early = [bytes, &raw.early].concat().into();
                    return Poll::Ready(Ok(()));
                }
            }
        }))?;
    }
}

/// Whatever the error is for which nothing else goes out: `flush` would only say that one again.
fn send_waiting<D: SideData>(raw: &mut Raw, session: &mut ConnectionCommon<D>, cx: &mut Context<'_>) {
    while session.wants_write() {
        if session.write_tls(&mut AtOnce { raw, cx }).is_err() {
            return;
        }
    }
}

/// What a socket takes without a wait.
struct AtOnce<'a, 'b> {
    raw: &'a mut Raw,
    cx: &'a mut Context<'b>,
}

impl io::Write for AtOnce<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match Pin::new(&mut *self.raw).poll_write(self.cx, bytes) {
            Poll::Ready(written) => written,
            Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Has nothing yet.
struct Nothing;

impl io::Read for Nothing {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }
}

/// Takes what is decrypted, as much as fits. True: the peer has said that this is its end, and nothing is left.
fn drain<D: SideData>(session: &mut ConnectionCommon<D>, buffer: &mut ReadBuf<'_>) -> io::Result<bool> {
    let before = buffer.filled().len();
    let mut reader = session.reader();
    while buffer.remaining() > 0 {
        let chunk = match reader.fill_buf() {
            Ok(chunk) => chunk,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            // A FIN, behind what was taken now. It is there still the next time.
            Err(_) if buffer.filled().len() > before => break,
            Err(error) => return Err(error),
        };
        if chunk.is_empty() {
            return Ok(buffer.filled().len() == before);
        }
        let count = chunk.len().min(buffer.remaining());
        buffer.put_slice(&chunk[..count]);
        reader.consume(count);
    }
    Ok(false)
}

/// Sends what the kernel takes at once; gives what it does not.
pub fn send_some(stream: &Stream, bytes: Box<[u8]>) -> Box<[u8]> {
    let Some(fd) = stream.socket() else { return Box::default() };
    let mut at = 0;
    while at < bytes.len() {
        match send(fd, &bytes[at..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(sent) => at += sent,
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => break,
            // Nobody will have the rest.
            Err(_) => return Box::default(),
        }
    }
    if at == 0 { bytes } else { bytes[at..].into() }
}

impl Raw {
    /// For a handshake, with what is known of it meanwhile.
    fn lend(stream: Stream, early: Bytes) -> (Self, Arc<Back>) {
        let back = Arc::<Back>::default();
        let raw =
            Self { stream: Some(stream), early, turn: 0, look: TURN_BYTES, quiet: 0, back: Some(Arc::clone(&back)) };
        (raw, back)
    }

    fn stream(&mut self) -> io::Result<Pin<&mut Stream>> {
        self.stream.as_mut().map(Pin::new).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(back) = &self.back {
            *back.stream.lock().unwrap_or_else(PoisonError::into_inner) = self.stream.take();
        }
    }
}

impl fmt::Debug for Raw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.stream.fmt(f)
    }
}

impl AsyncRead for Raw {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.back.is_none() && this.turn == 0 {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        if this.early.is_empty() {
            ready!(this.stream()?.poll_read(cx, buffer))?;
        } else {
            buffer.put_slice(&this.early.split_to(this.early.len().min(buffer.remaining())));
        }
        let count = buffer.filled().len() - before;
        if let Some(back) = &this.back {
            back.count.fetch_add(count, Ordering::Relaxed);
        } else {
            this.turn = this.turn.saturating_sub(count);
            this.quiet += count;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Raw {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().stream()?.poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().stream()?.poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().stream()?.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().stream()?.poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, future::poll_fn, io::Write as _, os::unix::net::UnixStream, time::Duration};

    use rcgen::{CertificateParams, KeyPair};
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use tokio::time::{Instant, timeout};
    use tokio_rustls::rustls::pki_types::ServerName;

    use super::*;

    /// Both ends over a pair of sockets.
    async fn pair(kind: SocketType) -> (Stream, Stream) {
        let folder = tempfile::tempdir().expect("a folder");
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(["pair.test".to_owned()]).expect("a name");
        let certificate = params.self_signed(&key).expect("a certificate");
        let files = (folder.path().join("pair.pem"), folder.path().join("pair.key"));
        fs::write(&files.0, certificate.pem()).expect("room");
        fs::write(&files.1, key.serialize_pem()).expect("room");
        let client = TlsClient::load(Some(&files.0), None).expect("a root");
        let server = TlsServer::load(&[files], None).expect("a certificate");
        let (near, far) = socketpair(AddressFamily::UNIX, kind, SocketFlags::NONBLOCK, None).expect("a pair");
        let [near, far] = [near, far]
            .map(|fd| Stream::Unix(tokio::net::UnixStream::from_std(UnixStream::from(fd)).expect("a runtime")));
        let name = ServerName::try_from("pair.test").expect("a name");
        let deadline = Instant::now() + Duration::from_mins(1);
        let (near, far) = tokio::join!(
            encrypt(near, &client, name, &[], deadline),
            Accepting::new(far, Bytes::new(), &server, false)
        );
        (near.expect("a server"), far.expect("a client"))
    }

    /// What fits in a record is one write and one read, with the frame's header before it: between sockets where each write is a
    /// packet, and what a read has no room for is lost.
    #[tokio::test]
    async fn a_record_is_one_write_and_one_read() {
        let (mut near, mut far) = pair(SocketType::SEQPACKET).await;
        let (header, payload) = ([1; FRAME_HEADER], vec![2; RECORD]);
        let pieces = [io::IoSlice::new(&header), io::IoSlice::new(&[]), io::IoSlice::new(&payload)];
        let wrote = poll_fn(|cx| Pin::new(&mut near).poll_write_vectored(cx, &pieces)).await.expect("room");
        let mut bytes = vec![0; 4 * RECORD];
        let read = poll_fn(|cx| far.poll_read_slice(cx, &mut bytes)).await.expect("what was written");
        assert_eq!((wrote, read), (RECORD + FRAME_HEADER, RECORD + FRAME_HEADER));
        assert_eq!(bytes[..read], [&header[..], &payload].concat());

        let message = vec![3; RECORD + FRAME_HEADER];
        let wrote = poll_fn(|cx| Pin::new(&mut near).poll_write(cx, &message)).await.expect("room");
        let read = poll_fn(|cx| far.poll_read_slice(cx, &mut bytes)).await.expect("what was written");
        assert_eq!((wrote, read), (message.len(), message.len()));
    }

    /// A good record, and behind it one that is none: the first is read to its end, whatever room there is for it, and the peer is sent
    /// the alert at once.
    #[tokio::test]
    async fn what_came_before_a_broken_record_is_read() {
        let (mut near, mut far) = pair(SocketType::STREAM).await;
        let message: Vec<u8> = (0..9000_u32).map(|at| at.to_le_bytes()[0]).collect();
        let wrote = poll_fn(|cx| Pin::new(&mut near).poll_write(cx, &message)).await.expect("room");
        assert_eq!(wrote, message.len());
        let Stream::Tls(tls) = &mut near else { panic!("no TLS") };
        // Application data that nobody has encrypted.
        let forged = [&[23, 3, 3, 0, 32][..], &[7; 32]].concat();
        let written = poll_fn(|cx| Pin::new(tls.raw()).poll_write(cx, &forged)).await.expect("room");
        assert_eq!(written, forged.len());
        let (mut read, mut bytes) = (Vec::new(), [0; 4000]);
        // The stream's own kind of end, behind all that was good.
        while let Ok(count @ 1..) = poll_fn(|cx| far.poll_read_slice(cx, &mut bytes)).await {
            read.extend_from_slice(&bytes[..count]);
        }
        assert!(read == message && far.is_broken_tls(), "{} bytes", read.len());
        let ended = timeout(Duration::from_mins(1), poll_fn(|cx| near.poll_read_slice(cx, &mut bytes))).await;
        assert!(near.is_broken_tls(), "no alert: {ended:?}");
    }

    /// Who had no room comes again with the same bytes and more behind them: exactly those that were encrypted count as written. The
    /// socket is filled, emptied, and the last write made once more.
    #[tokio::test]
    async fn what_is_owed_is_told_once() {
        let (mut near, mut far) = pair(SocketType::STREAM).await;
        let message = vec![4; 3 * RECORD];
        let frame = RECORD + FRAME_HEADER;
        let mut written = 0;
        while let Poll::Ready(count) =
            poll_fn(|cx| Poll::Ready(Pin::new(&mut near).poll_write(cx, &message[..frame]))).await
        {
            written += count.expect("a peer");
        }
        let mut bytes = vec![0; 4 * RECORD];
        let mut read = 0;
        while read < written {
            read += poll_fn(|cx| far.poll_read_slice(cx, &mut bytes)).await.expect("what was written");
        }
        let owed = poll_fn(|cx| Pin::new(&mut near).poll_write(cx, &message)).await.expect("room");
        written += owed;
        while read < written {
            read += poll_fn(|cx| far.poll_read_slice(cx, &mut bytes)).await.expect("what was owed");
        }
        assert_eq!((owed, read), (frame, written));
    }

    /// Nothing is lost or changes places, whatever the sizes of records and of the room for them: large ones first, of which more is
    /// looked at, with many small ones behind them, read into rooms of several sizes in turn.
    #[tokio::test]
    async fn records_and_rooms_of_all_sizes() {
        let large = [RECORD; 24].into_iter();
        let sizes = large.chain([1, 4096, 9000, 100]).chain(std::iter::repeat_n(2, 3000)).chain([RECORD, 300]);
        let pieces: Vec<Vec<u8>> =
            sizes.enumerate().map(|(nth, size)| (nth..).map(|at| at.to_le_bytes()[0]).take(size).collect()).collect();
        let all = pieces.concat();
        for rooms in [[64 << 10, 64 << 10, 64 << 10], [1, 7, 5000], [1, 64 << 10, 300], [20_000, 2, 16_384]] {
            let (mut near, mut far) = pair(SocketType::STREAM).await;
            let write = async {
                for piece in &pieces {
                    let mut left = &piece[..];
                    while !left.is_empty() {
                        let count = poll_fn(|cx| Pin::new(&mut near).poll_write(cx, left)).await.expect("a peer");
                        left = &left[count..];
                    }
                }
                near
            };
            let read = async {
                let mut read = Vec::new();
                for room in rooms.into_iter().cycle() {
                    let mut bytes = vec![0; room];
                    let count = poll_fn(|cx| far.poll_read_slice(cx, &mut bytes)).await.expect("more");
                    read.extend_from_slice(&bytes[..count]);
                    if read.len() >= all.len() || count == 0 {
                        break;
                    }
                }
                read
            };
            let both = timeout(Duration::from_mins(1), async { tokio::join!(write, read) });
            let (_near, read) = both.await.expect("all of it");
            assert!(read == all, "{} of {} bytes, or others, in rooms of {rooms:?}", read.len(), all.len());
        }
    }

    /// One look takes so much, and then others have their turn; it is asked for again at once.
    #[tokio::test]
    async fn a_look_takes_no_more_than_its_turn() {
        let (near, mut far) = UnixStream::pair().expect("a pair");
        near.set_nonblocking(true).expect("a socket");
        let near = Stream::Unix(tokio::net::UnixStream::from_std(near).expect("a runtime"));
        let mut raw =
            Raw { stream: Some(near), early: Bytes::new(), turn: TURN_BYTES, look: TURN_BYTES, quiet: 0, back: None };
        far.write_all(&vec![0; 2 * TURN_BYTES]).expect("room");
        let mut turns = Vec::new();
        for _ in 0..2 {
            let mut read = 0;
            loop {
                let mut bytes = [0; 4096];
                let mut buffer = ReadBuf::new(&mut bytes);
                match poll_fn(|cx| Poll::Ready(Pin::new(&mut raw).poll_read(cx, &mut buffer))).await {
                    Poll::Pending if raw.turn == 0 => break,
                    Poll::Pending => tokio::task::yield_now().await,
                    Poll::Ready(result) => result.expect("a socket"),
                }
                read += buffer.filled().len();
            }
            turns.push(read);
            raw.turn = TURN_BYTES;
        }
        assert_eq!((turns, raw.quiet), (vec![TURN_BYTES; 2], 2 * TURN_BYTES));
    }
}
