//! `tidegate drain`, `tidegate reload` and `tidegate status`: a client of the admin listener, for containers without a shell.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::{HeaderValue, Method, Request, StatusCode, header, uri::PathAndQuery};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, runtime, time::timeout};

use crate::token::Token;

/// For a connect, and for an answer that is there at once.
const PATIENCE: Duration = Duration::from_secs(10);
/// Of an answer.
const MAX_BYTES: usize = 16 << 20;

/// Who is asked.
#[derive(Debug)]
pub(super) struct Admin {
    /// Its admin listener.
    pub(super) address: SocketAddr,
    /// For who asks from elsewhere.
    pub(super) token: Option<Token>,
}

/// What is to be done about a drain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// Begin it, and wait for its end.
    Wait,
    /// Begin it.
    NoWait,
    /// Undo it.
    Undo,
}

/// Gives what is to be printed.
pub(super) fn drain(admin: &Admin, way: Way) -> anyhow::Result<String> {
    on_a_runtime(async {
        let path = if way == Way::Undo { "/undrain" } else { "/drain" };
        let status = expect_ok(ask(admin, Method::POST, path, Some(PATIENCE)).await?)?;
        if way != Way::Wait {
            return Ok(status);
        }
        // It takes as long as it takes: `drain.delay`, `drain.window` and `drain.timeout` bound it.
        let end = expect_ok(ask(admin, Method::GET, "/drain/wait", None).await?)?;
        if end.trim() != "drained" {
            bail!("the drain was undone");
        }
        // A signal may have ended the process in the same moment: drained it is.
        let last = ask(admin, Method::GET, "/status", Some(PATIENCE)).await.and_then(expect_ok);
        Ok(last.unwrap_or_else(|_| "{\"phase\":\"drained\"}\n".to_owned()))
    })
}

/// Gives what is to be printed: the report, as JSON. Of a rejected configuration the error says what `tidegate check` would.
pub(super) fn reload(admin: &Admin) -> anyhow::Result<String> {
    let (status, text) = on_a_runtime(ask(admin, Method::POST, "/reload", Some(PATIENCE)))
        .context("nobody knows what came of it, and it may yet be applied")?;
    let report: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    if !status.is_success()
        && let Some(findings) = report["findings"].as_array()
    {
        let findings: Vec<_> = findings.iter().filter_map(|finding| finding["text"].as_str()).collect();
        bail!("nothing has changed\n\n{}", findings.join("\n\n"));
    }
    expect_ok((status, text))
}

/// Gives what is to be printed.
pub(super) fn log(admin: &Admin, filter: &str) -> anyhow::Result<String> {
    let path = format!("/log?filter={filter}");
    on_a_runtime(async { expect_ok(ask(admin, Method::POST, &path, Some(PATIENCE)).await?) })
}

/// What is said at a path where nothing changes.
pub(super) fn look(admin: &Admin, path: &str) -> anyhow::Result<String> {
    on_a_runtime(async { expect_ok(ask(admin, Method::GET, path, Some(PATIENCE)).await?) })
}

fn on_a_runtime<T>(what: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    runtime::Builder::new_current_thread().enable_all().build()?.block_on(what)
}

fn expect_ok((status, text): (StatusCode, String)) -> anyhow::Result<String> {
    if !status.is_success() {
        // Not for a terminal to obey.
        bail!("{}", text.trim().replace(|char: char| char.is_control() && char != '\n', "?"));
    }
    Ok(text)
}

async fn ask(
    admin: &Admin,
    method: Method,
    path: &str,
    patience: Option<Duration>,
) -> anyhow::Result<(StatusCode, String)> {
    let address = reachable(admin.address);
    let fix = || {
        format!("cannot reach tidegate's admin listener at {address}: does it run there? --admin ADDR names another")
    };
    let stream = timeout(PATIENCE, TcpStream::connect(address)).await.with_context(fix)?.with_context(fix)?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake::<_, Empty<Bytes>>(TokioIo::new(stream)).await?;
    let mut request = Request::builder()
        .method(method.clone())
        .uri(PathAndQuery::try_from(path).with_context(|| format!("{path:?} can't be asked for"))?)
        .header(header::HOST, address.to_string())
        .header(header::CONNECTION, "close")
        .body(Empty::new())?;
    // Where it is asked for, and to nobody else: whoever has the port of a proxy that is not there would get it.
    if let Some(token) = admin.token.as_ref().filter(|_| method == Method::POST && !address.ip().is_loopback()) {
        let mut value = HeaderValue::from_bytes(&[b"Bearer ", token.expose()].concat())?;
        value.set_sensitive(true);
        request.headers_mut().insert(header::AUTHORIZATION, value);
    }
    let answer = async {
        let response = sender.send_request(request).await?;
        let (parts, body) = response.into_parts();
        let body = Limited::new(body, MAX_BYTES).collect().await.map_err(|error| anyhow::anyhow!(error))?.to_bytes();
        Ok((parts.status, String::from_utf8_lossy(&body).into_owned()))
    };
    let answer = async {
        tokio::pin!(answer, connection);
        tokio::select! {
            answer = &mut answer => answer,
            ended = &mut connection => {
                ended.with_context(|| format!("no answer from {address}"))?;
                // What it had to say is with the other half.
                answer.await
            }
        }
    };
    match patience {
        Some(patience) => timeout(patience, answer).await.with_context(|| format!("no answer from {address}"))?,
        None => answer.await,
    }
}

/// Whoever listens on all addresses is here too.
fn reachable(admin: SocketAddr) -> SocketAddr {
    let ip = match admin.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, admin.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_for_all_is_reached_here() {
        let reached = |text: &str| reachable(text.parse().expect("an address")).to_string();
        assert_eq!(reached("0.0.0.0:9090"), "127.0.0.1:9090");
        assert_eq!(reached("[::]:9090"), "[::1]:9090");
        assert_eq!(reached("10.0.0.1:9090"), "10.0.0.1:9090");
    }
}
