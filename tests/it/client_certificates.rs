//! Clients that show who they are by a certificate: who is served, what backends are told of them, and for how long it is believed.

use crate::harness::{
    DEADLINE, Message, Peer, Scene, Side, block,
    tls::{Authority, CLIENTS_NAME, Identity},
};
use std::{
    fs,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{ClientConfig, HandshakeKind, pki_types::ServerName},
};

fn handshakes(result: &str) -> String {
    format!("tidegate_tls_handshakes_total{{result=\"{result}\"}}")
}

fn asking(auth: &str, clients: &Authority) -> String {
    format!("listen.tls_client_auth = '{auth}'\nlisten.tls_client_ca = '{}'\n", clients.file().display())
}

const NAMES: [&str; 6] = [
    "X-Forwarded-Client-Cert",
    "X_Forwarded_Client_Cert",
    "X-Forwarded_Client-Cert",
    "Client-Cert",
    "Client_Cert",
    "Client-Cert-Chain",
];

/// Says what it was told of its client's certificate.
async fn tells(c: &mut Peer) {
    let request = c.read_head().await;
    let said = NAMES.map(|name| request.all(name).join("; "));
    c.reply(Message::status(200, "OK", &said.join("|"))).await;
    c.fin().await;
    c.until_end().await;
}

/// The answer to a request over a connection of its own, and whether a ticket was good for it; or how it failed.
fn ask(t: &Scene, config: &Arc<ClientConfig>, request: Message) -> Result<(String, bool), String> {
    let (config, address) = (Arc::clone(config), t.address());
    let request = request.header("Connection", "close").bytes();
    t.lab().place(Side::Client).run(|| {
        block(async move {
            let stream = TcpStream::connect(address).await.expect("tidegate listens");
            let name = ServerName::try_from(CLIENTS_NAME).expect("a name");
            let mut stream =
                TlsConnector::from(config).connect(name, stream).await.map_err(|error| error.to_string())?;
            // What the server thinks of the certificate is heard behind the handshake.
            let _ = stream.write_all(&request).await;
            let mut answer = Vec::new();
            let read = stream.read_to_end(&mut answer).await;
            let is_resumed = stream.get_ref().1.handshake_kind() == Some(HandshakeKind::Resumed);
            let _ = stream.shutdown().await;
            let text = String::from_utf8_lossy(&answer).into_owned();
            match text.split_once("\r\n\r\n") {
                Some((_, body)) => Ok((body.to_owned(), is_resumed)),
                None => Err(format!("{read:?} {text:?}")),
            }
        })
    })
}

fn said(t: &Scene, config: &Arc<ClientConfig>) -> Result<String, String> {
    ask(t, config, Message::get("/")).map(|(body, _)| body)
}

/// A client that says of itself whatever it may.
fn claiming() -> Message {
    NAMES.iter().fold(Message::get("/"), |request, name| request.header(name, "Hash=0;Subject=\"CN=root\""))
}

fn expired(authority: &Authority) -> Identity {
    authority.sign_until("old.test", 2001)
}

/// Who has a certificate of the right people is served, and named to the backend; who has none, where that is allowed, is served and not
/// named; all others are not served. Nobody names himself.
#[test]
fn who_is_served_and_named() {
    let (clients, others) = (Authority::new(), Authority::new());
    let identity = clients.sign("alice.test");
    for auth in ["optional", "required"] {
        // The clients of the lab are trusted: what they say of certificates is not.
        let settings = format!("{}http.trusted_proxies = ['198.18.0.0/15', '127.0.0.0/8']", asking(auth, &clients));
        let server = Authority::new();
        let [alice, old, stranger] = [
            identity_of(&server, &identity),
            identity_of(&server, &expired(&clients)),
            identity_of(&server, &others.sign("alice.test")),
        ];
        let nobody = server.client();
        let t = Scene::new(&settings).secure(server).backend(tells).start();
        for request in [Message::get("/"), claiming()] {
            let body = ask(&t, &alice, request).expect("served").0;
            let (names, rest) = body.split_once('|').expect("names");
            assert!(names.starts_with("Hash=") && names.ends_with(";DNS=alice.test"), "{body}");
            assert_eq!(rest, "||||", "{body}");
        }
        match (auth, ask(&t, &nobody, claiming())) {
            ("optional", answer) => assert_eq!(answer.expect("served").0, "|||||"),
            (_, answer) => assert!(answer.is_err(), "{answer:?}"),
        }
        for config in [&old, &stranger] {
            assert!(said(&t, config).is_err(), "it is not good");
        }
        let missing = u64::from(auth == "required");
        let metrics =
            t.proxy().metrics_when("those that were refused", |m| m.count(&handshakes("bad_certificate")) == 2);
        assert_eq!(metrics.count(&handshakes("no_certificate")), missing);
        let fix = |line: &serde_json::Value| line["fix"].as_str().is_some_and(|fix| fix.contains("tls_client_"));
        t.proxy().log_where("what to do", fix);
        t.no_rst();
    }
}

fn identity_of(server: &Authority, identity: &Identity) -> Arc<ClientConfig> {
    Arc::new(server.client_as(identity))
}

/// Where nobody is asked, a trusted proxy's word counts, which has asked itself; that of all others does not.
#[test]
fn where_nobody_is_asked() {
    for (networks, expected) in
        [("['198.18.0.0/15', '127.0.0.0/8']", "Hash=0;Subject=\"CN=root\""), ("['192.0.2.0/24']", "")]
    {
        let t =
            Scene::new(&format!("http.trusted_proxies = {networks}")).secure(Authority::new()).backend(tells).start();
        let config = t.authority().client();
        let body = ask(&t, &config, claiming()).expect("served").0;
        assert_eq!(body.split('|').next(), Some(expected), "{body}");
        t.no_rst();
    }
}

/// A ticket is worth what its certificate is: when those who sign are others, a client of the old ones is not let in, ticket or not, and
/// one of the new ones is; what is wrong with a file changes nothing.
#[test]
fn those_who_sign_are_others() {
    let (server, before, after) = (Authority::new(), Authority::new(), Authority::new());
    let settings = format!("{}reload.watch = '100ms'", asking("required", &before));
    let [old, new] = [&before, &after].map(|authority| identity_of(&server, &authority.sign("alice.test")));
    let t = Scene::new(&settings).secure(server).backend(tells).start();
    assert!(!ask(&t, &old, Message::get("/")).expect("served").1);
    assert!(ask(&t, &old, Message::get("/")).expect("served").1, "it has a ticket");
    assert!(said(&t, &new).is_err());

    let good = fs::read(after.file()).expect("a file");
    fs::write(before.file(), "nothing").expect("room");
    t.proxy().log_where("that it is of no use", |line| line.to_string().contains("tls_client_ca"));
    assert!(ask(&t, &old, Message::get("/")).expect("served").1, "it is as it was");

    fs::write(before.file(), good).expect("room");
    t.proxy().metrics_when("the reload", |m| m.get("tidegate_reloads_total{result=\"applied\"}") > 0.5);
    assert!(said(&t, &old).is_err(), "its ticket outlived those who sign");
    said(&t, &new).expect("served");
    t.no_rst();
}

/// A ticket does not make a certificate last longer: whoever shows it when that has expired is not let in.
#[test]
fn a_ticket_expires_with_its_certificate() {
    let (server, clients) = (Authority::new(), Authority::new());
    let soon = clients.sign_for("alice.test", Duration::from_secs(4));
    let (alice, begun) = (identity_of(&server, &soon), Instant::now());
    let t = Scene::new(&asking("required", &clients)).secure(server).backend(tells).start();
    let mut resumed = 0;
    while let Ok((_, is_resumed)) = ask(&t, &alice, Message::get("/")) {
        resumed += u32::from(is_resumed);
        assert!(begun.elapsed() < DEADLINE, "it lasts for ever");
        thread::sleep(Duration::from_millis(100));
    }
    let metrics = t.proxy().metrics_when("that it was not good", |m| m.count(&handshakes("bad_certificate")) == 1);
    assert!(resumed > 0 && metrics.count(&handshakes("full")) == 1, "it was no ticket");
    t.no_rst();
}
