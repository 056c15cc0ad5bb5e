//! The demo over real sockets, with tungstenite as the client.

use std::net::SocketAddr;

use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio::task::JoinHandle;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::frame::{Frame, coding::Data, coding::OpCode};
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, WebSocketConfig};
use tokio_tungstenite::{WebSocketStream, client_async_with_config};

use super::*;

/// No test waits this long, unless something is wrong.
const TOO_LONG: Duration = Duration::from_secs(20);

type Client = WebSocketStream<TcpStream>;

struct Running {
    address: SocketAddr,
    shutdown: CancellationToken,
    served: JoinHandle<io::Result<()>>,
    tasks: TaskTracker,
}

async fn start(limits: Limits) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let shutdown = CancellationToken::new();
    let tasks = TaskTracker::new();
    let served = tasks.spawn(serve_within(limits, listener, shutdown.clone()));
    Running { address, shutdown, served, tasks }
}

impl Running {
    async fn connect(&self, path: &str) -> Client {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(16 << 10).unwrap(); // so that a client that does not read is soon felt
        let stream = socket.connect(self.address).await.unwrap();
        let url = format!("ws://{}{path}", self.address);
        client_async_with_config(url, stream, Some(WebSocketConfig::default())).await.unwrap().0
    }

    async fn get(&self, head: &str) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let request = format!("{head}\r\nHost: {}\r\nConnection: close\r\n\r\n", self.address);
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut response = String::new();
        within(stream.read_to_string(&mut response)).await.unwrap();
        response
    }
}

async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(TOO_LONG, future).await.expect("this should not take so long")
}

async fn hear(client: &mut Client) -> Message {
    within(client.next()).await.expect("the stream should not be over").unwrap()
}

/// The code of the next Close, then the end of the stream: a FIN, no reset.
async fn hear_close(client: &mut Client) -> Option<CloseFrame> {
    loop {
        if let Message::Close(frame) = hear(client).await {
            assert!(within(client.next()).await.is_none(), "after both Closes there should be a FIN");
            return frame;
        }
    }
}

fn frame(code: CloseCode, reason: &'static str) -> CloseFrame {
    CloseFrame { code, reason: reason.into() }
}

// Goal: what is sent comes back with its type. Method: empty, small and large messages of both types, and a Ping.
#[tokio::test]
async fn echo_returns_text_and_binary() {
    let demo = start(Limits::default()).await;
    let mut client = demo.connect("/echo").await;
    for message in [
        Message::text("hello"),
        Message::text(""),
        Message::binary(vec![0, 255, 7]),
        Message::binary(vec![1; 1 << 20]),
        Message::text("x".repeat(70_000)),
    ] {
        within(client.send(message.clone())).await.unwrap();
        assert_eq!(hear(&mut client).await, message);
    }
    client.send(Message::Ping("p".into())).await.unwrap();
    assert_eq!(hear(&mut client).await, Message::Pong("p".into()));
}

// Goal: a client's Close is answered with its own code, then FIN. Method: a code of its own, and an empty Close.
#[tokio::test]
async fn a_close_is_answered_in_kind() {
    let demo = start(Limits::default()).await;
    for path in ["/echo", "/broadcast", "/feed"] {
        for close in [Some(frame(CloseCode::Library(4321), "bye")), None] {
            let mut client = demo.connect(path).await;
            client.close(close.clone()).await.unwrap();
            assert_eq!(hear_close(&mut client).await, close, "{path}");
        }
    }
}

// Goal: each error of a client's has its code. Method: one client per error.
#[tokio::test]
async fn errors_of_a_client_have_their_codes() {
    let demo = start(Limits { echo_message: 1000, ..Limits::default() }).await;
    let not_utf8 = Frame::message(vec![0xff], OpCode::Data(Data::Text), true);
    let reserved = Frame::message(vec![], OpCode::Data(Data::Reserved(3)), true);
    for (message, code) in [
        (Message::binary(vec![0; 1001]), CloseCode::Size),
        (Message::Frame(not_utf8), CloseCode::Invalid),
        (Message::Frame(reserved), CloseCode::Protocol),
    ] {
        let mut client = demo.connect("/echo").await;
        client.send(message).await.unwrap();
        assert_eq!(hear_close(&mut client).await.map(|close| close.code), Some(code));
    }
}

// Goal: what one says all hear, the speaker too, and a tick says how many they are. Method: two clients, a short tick.
#[tokio::test]
async fn broadcast_reaches_everybody() {
    let demo = start(Limits { tick: Duration::from_millis(20), ..Limits::default() }).await;
    let mut clients = [demo.connect("/broadcast").await, demo.connect("/broadcast").await];
    for client in &mut clients {
        // The tick also says that both have joined, which is later than the 101.
        while !hear(client).await.to_text().unwrap().ends_with(" UTC, 2 watching") {}
    }
    for (speaker, said) in [(0, Message::text("from the first")), (1, Message::binary(vec![2; 60_000]))] {
        clients[speaker].send(said.clone()).await.unwrap();
        for client in &mut clients {
            while hear(client).await != said {}
        }
    }
}

// Goal: all hear the same feed without a gap, it hears nobody, and its connections are counted. Method: two clients of which
// one talks, a short tick; the count before, with both, and after them.
#[tokio::test]
async fn the_feed_is_the_same_for_everybody() {
    let demo = start(Limits { feed_tick: Duration::from_millis(5), ..Limits::default() }).await;
    let count = async || demo.get("GET /feed/connections HTTP/1.1").await.lines().last().unwrap().to_owned();
    assert_eq!(count().await, "0 open, 0 since the start");
    let mut clients = [demo.connect("/feed").await, demo.connect("/feed").await];
    clients[0].send(Message::text("where is number 3?")).await.unwrap();
    let mut heard = [Vec::new(), Vec::new()];
    for (client, heard) in clients.iter_mut().zip(&mut heard) {
        while heard.len() < 20 {
            let said: serde_json::Value = serde_json::from_str(hear(client).await.to_text().unwrap()).unwrap();
            heard.push((said["number"].as_u64().unwrap(), said["at"].to_string()));
        }
        assert!(heard.windows(2).all(|two| two[0].0 + 1 == two[1].0), "{heard:?}");
    }
    let [first, second] = heard;
    assert!(first.iter().filter(|one| second.contains(one)).count() > 0, "{first:?} {second:?}");
    assert_eq!(count().await, "2 open, 2 since the start");
    for mut client in clients {
        client.close(None).await.unwrap();
        hear_close(&mut client).await;
    }
    // The last one's place is given back a moment after its FIN.
    within(async { while count().await != "0 open, 2 since the start" {} }).await;
}

// Goal: a client that does not read gets 1013 and costs the others nothing. Method: it reads nothing while another says
// and hears so much that no kernel buffer can hold it; the other sees it leave in the tick.
#[tokio::test]
async fn a_slow_watcher_is_told_1013() {
    let limits = Limits { tick: Duration::from_millis(20), close_timeout: TOO_LONG, ..Limits::default() };
    let demo = start(limits).await;
    let mut slow = demo.connect("/broadcast").await;
    let mut good = demo.connect("/broadcast").await;
    while !hear(&mut good).await.to_text().unwrap().ends_with(" 2 watching") {}

    let said = Message::binary(vec![3; 64 << 10]);
    'saying: loop {
        within(good.send(said.clone())).await.unwrap();
        loop {
            let heard = hear(&mut good).await;
            if heard == said {
                break;
            }
            if heard.to_text().unwrap().ends_with(" 1 watching") {
                break 'saying;
            }
        }
    }
    assert_eq!(hear_close(&mut slow).await, Some(frame(CloseCode::Again, "too slow for this broadcast")));
}

// Goal: at the end everybody gets 1001, and serve returns when they have left. Method: one client that answers, one
// that is idle on HTTP, one that neither reads nor answers and must not hold it up for longer than it may.
#[tokio::test]
async fn shutdown_tells_everybody_1001() {
    let short = Duration::from_millis(200);
    let demo = start(Limits { close_timeout: short, linger: short, ..Limits::default() }).await;
    let mut clients = [demo.connect("/echo").await, demo.connect("/broadcast").await];
    let mut idle = TcpStream::connect(demo.address).await.unwrap();
    let silent = demo.connect("/echo").await;

    demo.shutdown.cancel();
    for client in &mut clients {
        assert_eq!(hear_close(client).await, Some(frame(CloseCode::Away, "the demo backend is stopping")));
    }
    assert_eq!(within(idle.read(&mut [0; 1])).await.unwrap(), 0);
    within(demo.served).await.unwrap().unwrap();
    drop(silent);
    demo.tasks.close();
    within(demo.tasks.wait()).await;
    assert!(TcpStream::connect(demo.address).await.is_err(), "nobody should listen any more");
}

// Goal: plain requests get what the table in mod.rs says. Method: one connection each.
#[tokio::test]
async fn plain_requests() {
    let demo = start(Limits::default()).await;
    for (head, status) in [
        ("GET / HTTP/1.1", "200 OK"),
        ("GET /healthz HTTP/1.1", "200 OK"),
        ("GET /feed/connections HTTP/1.1", "200 OK"),
        ("GET /nothing HTTP/1.1", "404 Not Found"),
        ("POST / HTTP/1.1\r\nContent-Length: 0", "404 Not Found"),
        ("GET /echo HTTP/1.1", "426 Upgrade Required"),
    ] {
        let response = demo.get(head).await;
        assert!(response.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{head}\n{response}");
    }
    let page = demo.get("GET / HTTP/1.1").await;
    for part in ["content-type: text/html", "id=\"status\"", "id=\"message\"", "id=\"send\"", "id=\"log\""] {
        assert!(page.contains(part), "the page lacks {part}:\n{page}");
    }
    let refused = demo.get("GET /echo HTTP/1.1").await;
    assert!(refused.contains("\r\nupgrade: websocket\r\n"), "{refused}");
    assert!(refused.contains("\r\nsec-websocket-version: 13\r\n"), "{refused}");
}

// Goal: beyond the bound on connections the next client waits, and is served when one has left. Method: a bound of one.
#[tokio::test]
async fn connections_are_bounded() {
    let demo = start(Limits { connections: 1, ..Limits::default() }).await;
    let mut first = demo.connect("/echo").await;
    let second = demo.connect("/echo");
    tokio::pin!(second);
    // An echo passes in the meantime, so the second had its chance.
    tokio::select! {
        biased;
        _ = &mut second => panic!("the second client should wait"),
        () = async {
            first.send(Message::text("still alone")).await.unwrap();
            assert_eq!(hear(&mut first).await, Message::text("still alone"));
        } => {}
    }
    first.close(None).await.unwrap();
    hear_close(&mut first).await;
    drop(first);
    let mut second = within(second).await;
    second.send(Message::text("now I")).await.unwrap();
    assert_eq!(hear(&mut second).await, Message::text("now I"));
}
