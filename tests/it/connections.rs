//! Which sessions there are, as an operator asks for them.

use crate::harness::{Gate, Scene, Side, backend};
use serde_json::Value;

/// `tidegate connections`, where the proxy runs: its status, what it prints, what it says besides.
fn connections(t: &Scene, arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = t.lab().command_in(Side::Proxy, env!("CARGO_BIN_EXE_tidegate"));
    command.args(["connections", "--admin", &t.proxy().admin.to_string()]).args(arguments);
    let output = command.output().expect("the binary");
    let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).expect("text"));
    (output.status.code(), out, err)
}

fn paths(json: &str) -> Vec<String> {
    let answer: Value = serde_json::from_str(json).expect("JSON");
    let sessions = answer["sessions"].as_array().expect("a list");
    sessions.iter().map(|session| session["path"].as_str().expect("a path").to_owned()).collect()
}

/// Each session is there from its 101 to its end, in the order that is asked for, and only those that are asked for.
#[test]
fn sessions_are_listed() {
    let t = Scene::new("").backend(backend::echo).start();
    let done = Gate::new("all was asked");
    let clients: Vec<_> = (0..3)
        .map(|index| {
            let (open, all) = (Gate::new("the session is open"), done.clone());
            let opened = open.clone();
            let client = t.start_client(async move |c| {
                c.handshake(&format!("/room/{index}?secret")).await;
                opened.open();
                all.passed().await;
                c.send_close(1000, "").await;
                c.until_end().await
            });
            open.pass();
            t.proxy().metrics_when("it", |metrics| metrics.get("tidegate_connections_active") > f64::from(index) + 0.5);
            client
        })
        .collect();
    let (code, table, count) = connections(&t, &[]);
    assert_eq!((code, count.as_str()), (Some(0), "3 shown of 3 that match, 3 in all\n"));
    let rows: Vec<&str> = table.lines().collect();
    assert!(rows.len() == 4 && rows[0].starts_with("CLIENT "), "{table}");
    for (index, row) in rows[1..].iter().enumerate() {
        assert!(
            row.contains(&format!(" /room/{index} ")) && row.contains(" dedicated ") && !row.contains("secret"),
            "{table}"
        );
    }
    let json = |arguments: &[&str]| {
        let (code, out, err) = connections(&t, &[&["--format", "json"], arguments].concat());
        assert_eq!((code, err), (Some(0), String::new()));
        out
    };
    assert_eq!(paths(&json(&["--limit", "2"])), ["/room/0", "/room/1"]);
    assert_eq!(paths(&json(&["--route", ""])).len(), 3);
    assert_eq!(paths(&json(&["--route", "/room/*"])).len(), 0);
    assert_eq!(paths(&json(&["--older", "3600", "--sort", "address"])).len(), 0);
    let client = t.lab().address(Side::Client, Side::Proxy).to_string();
    assert_eq!(paths(&json(&["--address", &client])).len(), 3);
    assert_eq!(paths(&json(&["--address", "192.0.2.0/24"])).len(), 0);
    let (code, _, said) = connections(&t, &["--address", "nobody"]);
    assert!(code == Some(1) && said.contains("address=nobody: no address"), "{code:?} {said}");
    done.open();
    for client in clients {
        client.join().assert_closed_with(1000);
    }
    t.proxy().metrics_when("their end", |metrics| metrics.get("tidegate_connections_active") < 0.5);
    assert_eq!(paths(&json(&[])).len(), 0);
    t.no_rst();
}
