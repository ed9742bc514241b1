//! The QMP client against a server that plays a transcript, and against real QEMUs.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod support;

use std::future::Future;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use proptest::prelude::*;
use qemu_glue::qmp::{Client, MESSAGE_BYTES_MAX, QmpError, RunState};
use serde_json::{Value, json};
use support::{Qemu, folder, programs};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

const GREETING: &str = concat!(
    r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "#,
    r#""capabilities": ["oob"]}}"#
);

/// The other side of one connection.
struct Server {
    stream: BufReader<UnixStream>,
}

impl Server {
    async fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).await.unwrap();
    }

    async fn line(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).await.unwrap();
        serde_json::from_str(&line).unwrap()
    }

    async fn reply(&mut self, id: &Value, value: &Value) {
        self.send(&format!("{}\n", json!({ "return": value, "id": id }))).await;
    }

    /// The greeting and the negotiation, whose command is returned.
    async fn negotiate(&mut self) -> Value {
        self.send(&format!("{GREETING}\r\n")).await;
        let command = self.line().await;
        self.reply(&command["id"], &json!({})).await;
        command
    }
}

/// Lets `play` serve the first connection to a socket in `folder`.
fn serve<F, T>(folder: &Path, play: impl FnOnce(Server) -> F + Send + 'static) -> JoinHandle<T>
where
    F: Future<Output = T> + Send,
    T: Send + 'static,
{
    let listener = UnixListener::bind(folder.join("qmp")).unwrap();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        play(Server { stream: BufReader::new(stream) }).await
    })
}

async fn connect(folder: &Path) -> Client {
    Client::connect(folder.join("qmp")).await.unwrap()
}

fn closed_because(error: &QmpError, part: &str) {
    let text = error.to_string();
    assert!(error.is_closed() && text.contains(part) && text.contains("went away"), "{text}");
}

#[tokio::test]
async fn out_of_band_is_enabled_where_it_is_offered() {
    let folder = folder();
    let server = serve(folder.path(), |mut server| async move { server.negotiate().await });
    let client = connect(folder.path()).await;
    let command = server.await.unwrap();
    assert_eq!(command["execute"], "qmp_capabilities");
    assert_eq!(command["arguments"], json!({ "enable": ["oob"] }));
    assert_eq!((client.version().major, client.version().minor), (7, 2));
    assert_eq!(client.peer().pid, std::process::id().cast_signed());
}

#[tokio::test]
async fn a_monitor_without_out_of_band_is_used_without() {
    let folder = folder();
    let server = serve(folder.path(), |mut server| async move {
        server.send(&GREETING.replace("\"oob\"", "")).await;
        server.send("\n").await;
        let command = server.line().await;
        server.reply(&command["id"], &json!({})).await;
        (server, command)
    });
    let client = connect(folder.path()).await;
    let (_server, command) = server.await.unwrap();
    assert_eq!(command.get("arguments"), None);
    let refused = client.execute_oob("migrate-pause", Value::Null).await.unwrap_err();
    assert!(matches!(refused, QmpError::NoOutOfBand { .. }));
}

#[tokio::test]
async fn answers_find_their_commands_in_any_order() {
    let folder = folder();
    serve(folder.path(), |mut server| async move {
        server.negotiate().await;
        let mut commands = Vec::new();
        for _ in 0..20 {
            commands.push(server.line().await);
        }
        for command in commands.iter().rev() {
            server.reply(&command["id"], &command["arguments"]["n"]).await;
            // The same id again must not reach anybody.
            server.reply(&command["id"], &json!("twice")).await;
        }
        server
    });
    let client = connect(folder.path()).await;
    let mut commands = tokio::task::JoinSet::new();
    for n in 0..20 {
        let client = client.clone();
        commands.spawn(async move { (n, client.execute("echo", json!({ "n": n })).await) });
    }
    while let Some(done) = commands.join_next().await {
        let (n, answer) = done.unwrap();
        assert_eq!(answer.unwrap(), json!(n));
    }
}

#[tokio::test]
async fn answers_to_an_earlier_client_are_passed_over() {
    let folder = folder();
    serve(folder.path(), |mut server| async move {
        server.send("{\"return\": {}, \"id\": 9}\n{\"event\": \"STOP\"}\n").await;
        server.negotiate().await;
        let command = server.line().await;
        for id in 0..20 {
            server.reply(&json!(id), &json!("stale")).await;
        }
        server.reply(&command["id"], &json!("fresh")).await;
        server
    });
    let client = connect(folder.path()).await;
    assert_eq!(client.execute("x", Value::Null).await.unwrap(), json!("fresh"));
}

#[tokio::test]
async fn lines_may_come_in_pieces() {
    let folder = folder();
    serve(folder.path(), |mut server| async move {
        for byte in format!("{GREETING}\r\n").bytes() {
            server.stream.write_all(&[byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
        let command = server.line().await;
        server.reply(&command["id"], &json!({})).await;
        let command = server.line().await;
        let answer = format!("{{\"return\": \"ok\", \"id\": {}}}\n", command["id"]);
        let (head, tail) = answer.split_at(9);
        server.send(head).await;
        tokio::time::sleep(Duration::from_millis(30)).await;
        server.send(tail).await;
        server
    });
    let client = connect(folder.path()).await;
    assert_eq!(client.execute("x", Value::Null).await.unwrap(), json!("ok"));
}

#[tokio::test]
async fn events_and_unknown_messages_come_between() {
    let folder = folder();
    serve(folder.path(), |mut server| async move {
        server.negotiate().await;
        let command = server.line().await;
        server
            .send("{\"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \"event\": \"STOP\"}\n")
            .await;
        server.send("{\"event\": \"FUTURE_EVENT\", \"data\": {\"deep\": [1, {}]}}\n").await;
        server.send("{\"invention\": true}\n").await;
        server.send("{\"error\": {\"class\": \"GenericError\", \"desc\": \"no id\"}}\n").await;
        server.reply(&command["id"], &json!({ "running": false, "status": "paused" })).await;
        server
    });
    let client = connect(folder.path()).await;
    let mut events = client.subscribe();
    let status = client.query_status().await.unwrap();
    assert_eq!(status.state, RunState::Paused);
    let stop = events.recv().await.unwrap();
    assert_eq!((stop.name.as_str(), stop.seconds, stop.microseconds), ("STOP", 1, 2));
    let future = events.recv().await.unwrap();
    assert_eq!((future.name.as_str(), future.seconds), ("FUTURE_EVENT", -1));
    assert_eq!(future.data, json!({ "deep": [1, {}] }));
}

#[tokio::test]
async fn a_refusal_carries_the_text_of_qemu() {
    let folder = folder();
    serve(folder.path(), |mut server| async move {
        server.negotiate().await;
        let id = server.line().await["id"].clone();
        let error = json!({ "error": { "class": "CommandNotFound", "desc": "no such" }, "id": id });
        server.send(&format!("{error}\n")).await;
        let id = server.line().await["id"].clone();
        server.reply(&id, &json!({ "running": "perhaps" })).await;
        server
    });
    let client = connect(folder.path()).await;
    let error = client.execute("fly", Value::Null).await.unwrap_err();
    assert!(error.is_command_not_found() && error.to_string().contains("no such"), "{error}");
    let error = client.query_status().await.unwrap_err();
    assert!(matches!(error, QmpError::Answer { .. }), "{error}");
}

#[tokio::test]
async fn the_end_of_the_connection_reaches_everybody() {
    let folder = folder();
    serve(folder.path(), |mut server| async move {
        server.negotiate().await;
        server.line().await;
        server.line().await;
    });
    let client = connect(folder.path()).await;
    let mut events = client.subscribe();
    let (first, second) =
        tokio::join!(client.execute("one", Value::Null), client.execute_oob("two", Value::Null));
    closed_because(&first.unwrap_err(), "closed by QEMU");
    closed_because(&second.unwrap_err(), "closed by QEMU");
    assert!(events.recv().await.is_err());
    assert!(client.is_closed());
    let begun = Instant::now();
    closed_because(&client.execute("three", Value::Null).await.unwrap_err(), "closed by QEMU");
    assert!(begun.elapsed() < Duration::from_secs(1));
    assert!(client.subscribe().recv().await.is_err());
}

/// What the client says when this comes instead of an answer.
async fn answer_to(bytes: Vec<u8>) -> QmpError {
    let folder = folder();
    serve(folder.path(), |mut server| async move {
        server.negotiate().await;
        server.line().await;
        // The client may hang up before it has taken everything.
        let _ = server.stream.write_all(&bytes).await;
    });
    connect(folder.path()).await.execute("x", Value::Null).await.unwrap_err()
}

#[tokio::test]
async fn damage_ends_the_connection() {
    closed_because(&answer_to(b"garbage\n".to_vec()).await, "no JSON");
    closed_because(&answer_to(b"[1, 2]\n".to_vec()).await, "no JSON object");
    closed_because(&answer_to(b"{\"return\": {".to_vec()).await, "in the middle of a message");
    let deep = [vec![b'['; 10_000], vec![b'\n']].concat();
    closed_because(&answer_to(deep).await, "no JSON");
    let long = vec![b' '; MESSAGE_BYTES_MAX + 2];
    closed_because(&answer_to(long).await, "longer than");
}

#[tokio::test]
async fn a_busy_monitor_is_recognised() {
    let folder = folder();
    let listener = UnixListener::bind(folder.path().join("qmp")).unwrap();
    let patience = Duration::from_millis(200);
    let error = Client::connect_within(&folder.path().join("qmp"), patience).await.unwrap_err();
    assert!(matches!(error, QmpError::NoGreeting { .. }), "{error}");
    assert!(error.to_string().contains("another client holds"), "{error}");
    drop(listener);
}

#[tokio::test]
async fn what_is_not_qmp_is_recognised() {
    for text in ["SSH-2.0-OpenSSH\r\n", "{\"return\": {}}\n", "{\"QMP\": {}}\n", ""] {
        let folder = folder();
        serve(folder.path(), move |mut server| async move { server.send(text).await });
        let error = Client::connect(folder.path().join("qmp")).await.unwrap_err();
        assert!(matches!(error, QmpError::NotQmp { .. }), "{text:?}: {error}");
    }
    let folder = folder();
    let error = Client::connect(folder.path().join("nothing")).await.unwrap_err();
    assert!(matches!(error, QmpError::Connect { .. }), "{error}");
}

#[tokio::test]
async fn a_late_answer_hurts_nobody() {
    let folder = folder();
    serve(folder.path(), |mut server| async move {
        server.negotiate().await;
        let late = server.line().await;
        let next = server.line().await;
        server.reply(&late["id"], &json!("late")).await;
        server.reply(&next["id"], &json!("next")).await;
        server
    });
    let client = connect(folder.path()).await;
    let patience = Duration::from_millis(100);
    let error = client.execute_within("slow", Value::Null, patience).await.unwrap_err();
    assert!(matches!(error, QmpError::Timeout { .. }), "{error}");
    assert_eq!(client.execute("fast", Value::Null).await.unwrap(), json!("next"));
}

#[tokio::test]
async fn a_caller_that_gives_up_leaves_no_half_command() {
    let folder = folder();
    let server = serve(folder.path(), |mut server| async move {
        server.negotiate().await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        let first = server.line().await;
        let second = server.line().await;
        server.reply(&second["id"], &json!({})).await;
        (first, second)
    });
    let client = connect(folder.path()).await;
    let huge = json!({ "text": "x".repeat(MESSAGE_BYTES_MAX) });
    let error = client.execute("huge", huge).await.unwrap_err();
    assert!(matches!(error, QmpError::TooLong { .. }));
    // Larger than any socket buffer: writing it cannot be over when the caller gives up.
    let large = json!({ "text": "x".repeat(4 << 20) });
    let patience = Duration::from_millis(50);
    client.execute_within("large", large, patience).await.unwrap_err();
    client.execute("small", Value::Null).await.unwrap();
    let (first, second) = server.await.unwrap();
    assert_eq!((&first["execute"], &second["execute"]), (&json!("large"), &json!("small")));
}

/// Receives one command, and the descriptors that came with it.
fn receive(socket: RawFd) -> nix::Result<(String, Vec<OwnedFd>)> {
    let mut buffer = [0; 4096];
    let mut space = nix::cmsg_space!([RawFd; 4]);
    let mut pieces = [IoSliceMut::new(&mut buffer)];
    let flags = MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<()>(socket, &mut pieces, Some(&mut space), flags)?;
    let mut descriptors = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            descriptors.extend(numbers.into_iter().map(own));
        }
    }
    let length = message.bytes;
    Ok((String::from_utf8_lossy(&buffer[..length]).into_owned(), descriptors))
}

fn own(number: RawFd) -> OwnedFd {
    // Reopened through /proc: taking a number over would need unsafe code.
    let file = std::fs::File::open(format!("/proc/self/fd/{number}")).unwrap();
    nix::unistd::close(number).unwrap();
    file.into()
}

#[tokio::test]
async fn descriptors_travel_one_at_a_time() {
    let folder = folder();
    let server = serve(folder.path(), |mut server| async move {
        server.negotiate().await;
        let socket = server.stream.get_ref().as_raw_fd();
        let mut seen = Vec::new();
        for _ in 0..3 {
            server.stream.get_ref().readable().await.unwrap();
            tokio::time::sleep(Duration::from_millis(30)).await;
            let (line, descriptors) = receive(socket).unwrap();
            assert_eq!(line.lines().count(), 1, "a second one came before the answer: {line}");
            assert_eq!(descriptors.len(), 1);
            let command: Value = serde_json::from_str(&line).unwrap();
            seen.push(command["arguments"]["fdname"].as_str().unwrap().to_owned());
            server.reply(&command["id"], &json!({})).await;
        }
        seen.sort();
        seen
    });
    let client = connect(folder.path()).await;
    let file = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    let (a, b, c) = tokio::join!(
        client.send_fd("a", file()),
        client.send_fd("b", file()),
        client.send_fd("c", file())
    );
    a.and(b).and(c).unwrap();
    assert_eq!(server.await.unwrap(), ["a", "b", "c"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever comes back, the caller gets an answer or an error, never a hang.
    #[test]
    fn no_answer_hangs_or_panics(
        pieces in prop::collection::vec(
            prop_oneof![
                Just("{\"return\": 1, \"id\": 2}\n".to_owned()),
                Just("{\"event\": \"E\"}\n".to_owned()),
                Just("{\"error\": {}, \"id\": 99}\n".to_owned()),
                Just("\n".to_owned()),
                "[ -~]{0,20}",
            ],
            0..6,
        ),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let folder = folder();
            serve(folder.path(), |mut server| async move {
                server.negotiate().await;
                server.line().await;
                for piece in pieces {
                    let _ = server.stream.write_all(piece.as_bytes()).await;
                }
            });
            let client = connect(folder.path()).await;
            let answer = client.execute("x", Value::Null);
            let answer = tokio::time::timeout(Duration::from_secs(5), answer).await;
            assert!(matches!(answer, Ok(Ok(_) | Err(QmpError::Closed { .. }))), "{answer:?}");
        });
    }
}

#[tokio::test]
async fn a_real_monitor_serves_one_client_at_a_time() {
    for program in programs() {
        let folder = folder();
        let qemu = Qemu::start_shared(&program, folder.path(), "vm", &[]);
        let first = qemu.client().await;
        let patience = Duration::from_millis(500);
        let second = Client::connect_within(&qemu.socket, patience).await;
        assert!(matches!(second, Err(QmpError::NoGreeting { .. })), "{second:?}");
        assert_eq!(first.query_version().await.unwrap(), *first.version());
        assert_eq!(first.peer().pid, qemu.pid());
        drop(first);
        let third = qemu.client().await;
        assert!(third.query_status().await.unwrap().running);
    }
}

#[tokio::test]
async fn a_real_qemu_that_dies_or_quits_is_noticed() {
    for program in programs() {
        let folder = folder();
        let qemu = Qemu::start_shared(&program, folder.path(), "vm", &[]);
        let client = qemu.client().await;
        let mut events = client.subscribe();
        client.stop().await.unwrap();
        assert_eq!(events.recv().await.unwrap().name, "STOP");
        client.announce_self().await.unwrap();
        assert_eq!(client.query_name().await.unwrap(), None);
        assert!(client.query_uuid().await.unwrap().starts_with("00000000-"));
        drop(qemu);
        closed_because(&client.query_status().await.unwrap_err(), "");

        let qemu = Qemu::start_shared(&program, folder.path(), "vm2", &[]);
        let client = qemu.client().await;
        client.quit().await.unwrap();
        closed_because(&client.query_status().await.unwrap_err(), "");
    }
}

#[tokio::test]
async fn large_answers_of_a_real_qemu_are_read() {
    for program in programs() {
        let folder = folder();
        let qemu = Qemu::start_shared(&program, folder.path(), "vm", &[]);
        let client = qemu.client().await;
        let schema = client.execute("query-qmp-schema", Value::Null).await.unwrap();
        assert!(schema.as_array().unwrap().len() > 500);
        let (status, migration) = tokio::join!(client.query_status(), client.query_migrate());
        assert!(status.unwrap().running);
        assert!(!migration.unwrap().is_under_way());
    }
}
