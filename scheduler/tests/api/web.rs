//! The page for a browser without a certificate: who is let in.

use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::Duration;

use scheduler::api::Client;
use scheduler::api::web::{Web, WebError};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{Authority, Served, agent_and_client};

/// A page, its agent, and the token.
struct Page {
    served: Served,
    addr: String,
    token: String,
    authority: Authority,
}

async fn page() -> Page {
    let (served, client, authority) = agent_and_client().await;
    let web = Web::bind("127.0.0.1:0".parse().unwrap(), client, vec![served.addr.clone()]);
    let web = web.await.unwrap();
    let url = web.url();
    tokio::spawn(web.serve(std::future::pending()));
    let (addr, token) = url.strip_prefix("http://").unwrap().split_once("/?token=").unwrap();
    Page { served, addr: addr.to_owned(), token: token.to_owned(), authority }
}

/// Sends a request's head and takes the whole answer.
async fn ask(addr: &str, head: &str) -> String {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    let request = format!("{head}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer);
    timeout(Duration::from_secs(20), read).await.expect("an answer").unwrap();
    String::from_utf8(answer).unwrap()
}

impl Page {
    fn cookie(&self) -> String {
        format!("godwit-{}={}", self.addr.rsplit_once(':').unwrap().1, self.token)
    }

    async fn get(&self, path: &str, headers: &str) -> String {
        ask(&self.addr, &format!("GET {path} HTTP/1.1\r\nHost: {}{headers}", self.addr)).await
    }

    async fn with_cookie(&self, path: &str, headers: &str) -> String {
        self.get(path, &format!("\r\nCookie: other=1; {}{headers}", self.cookie())).await
    }
}

fn status(answer: &str) -> u16 {
    answer.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status")
}

#[tokio::test]
async fn the_token_becomes_a_cookie_and_leaves_the_address() {
    let page = page().await;
    let entered = page.get(&format!("/?token={}", page.token), "").await;
    assert_eq!(status(&entered), 303, "{entered}");
    assert!(entered.contains("location: /\r\n"), "{entered}");
    let cookie = format!("set-cookie: {}; Path=/; HttpOnly; SameSite=Strict", page.cookie());
    assert!(entered.contains(&cookie), "{entered}");
    for (path, text) in [
        ("/", "<title>Godwit</title>"),
        ("/main.js", "poll"),
        ("/v1/state", "\"agent\":\"host-001\""),
        ("/v1/hosts/host-002/history", "\"points\""),
        ("/metrics", "godwit_hosts 3"),
        ("/openapi.json", "\"openapi\": \"3.1"),
    ] {
        let answer = page.with_cookie(path, "").await;
        assert_eq!(status(&answer), 200, "{path}: {answer}");
        assert!(answer.contains(text), "{path}: {answer:.2000}");
        assert!(answer.contains("content-security-policy: default-src 'none'"), "{path}");
    }
}

#[tokio::test]
async fn without_the_token_there_is_nothing() {
    let page = page().await;
    let short = &page.token[..page.token.len() - 1];
    let port = page.addr.rsplit_once(':').unwrap().1;
    for (path, headers) in [
        ("/", String::new()),
        ("/main.js", String::new()),
        ("/v1/state", String::new()),
        ("/v1/state?token=", String::new()),
        ("/?token=", String::new()),
        (&format!("/?token={short}"), String::new()),
        // It counts in the page's address only: addresses of other requests are logged and passed on.
        (&format!("/v1/state?token={}", page.token), String::new()),
        ("/v1/state", format!("\r\nCookie: godwit-{port}={short}")),
        ("/v1/state", format!("\r\nCookie: godwit-1={}", page.token)),
    ] {
        let answer = page.get(path, &headers).await;
        assert_eq!(status(&answer), 403, "{path} {headers}");
        assert!(!answer.contains("host-00") && !answer.contains("set-cookie"), "{answer}");
    }
}

#[tokio::test]
async fn foreign_names_for_this_address_are_refused() {
    let page = page().await;
    let port = page.addr.rsplit_once(':').unwrap().1.to_owned();
    let cookie = page.cookie();
    for (host, expected) in [
        (page.addr.clone(), 200),
        (format!("localhost:{port}"), 200),
        (format!("evil.example:{port}"), 403),
        ("127.0.0.1".to_owned(), 403),
        (format!("127.0.0.1.evil.example:{port}"), 403),
    ] {
        let head = format!("GET /v1/state HTTP/1.1\r\nHost: {host}\r\nCookie: {cookie}");
        assert_eq!(status(&ask(&page.addr, &head).await), expected, "{host}");
    }
}

#[tokio::test]
async fn other_sites_pages_change_nothing() {
    let page = page().await;
    let own = format!("http://{}", page.addr);
    let drain = async |headers: String| {
        let head = format!(
            "PUT /v1/hosts/host-002/drain HTTP/1.1\r\nHost: {}\r\nCookie: {}{headers}",
            page.addr,
            page.cookie()
        );
        status(&ask(&page.addr, &head).await)
    };
    assert_eq!(drain("\r\nOrigin: http://127.0.0.1:1".into()).await, 403);
    assert_eq!(drain("\r\nSec-Fetch-Site: same-site".into()).await, 403);
    assert!(page.served.agent.asked().is_empty());
    assert_eq!(drain(format!("\r\nOrigin: {own}\r\nSec-Fetch-Site: same-origin")).await, 204);
    assert_eq!(page.served.agent.asked(), ["operator: drain host-002"]);
}

#[tokio::test]
async fn an_agent_that_is_away_is_said_to_be_and_the_next_is_asked() {
    let Page { mut served, authority, .. } = page().await;
    let other = Served::begin(&authority).await;
    let client = Client::new(authority.identity("second"));
    let agents = vec![served.addr.clone(), other.addr.clone()];
    let listen: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let web = Web::bind(listen, client, agents).await.unwrap();
    let url = web.url();
    tokio::spawn(web.serve(std::future::pending()));
    let (addr, token) = url.strip_prefix("http://").unwrap().split_once("/?token=").unwrap();
    let page = Page { addr: addr.to_owned(), token: token.to_owned(), served: other, authority };
    assert_eq!(status(&page.with_cookie("/v1/state", "").await), 200);
    served.stop.take().unwrap().send(()).unwrap();
    served.serving.await.unwrap().unwrap();
    assert_eq!(status(&page.with_cookie("/v1/state", "").await), 200);
    let Page { served: mut other, addr, token, authority } = page;
    other.stop.take().unwrap().send(()).unwrap();
    (&mut other.serving).await.unwrap().unwrap();
    let page = Page { served: other, addr, token, authority };
    let answer = page.with_cookie("/v1/state", "").await;
    assert_eq!(status(&answer), 503);
    assert!(answer.contains("cannot be asked"), "{answer}");
    assert_eq!(status(&page.with_cookie("/", "").await), 200, "the page itself is there");
}

#[tokio::test]
async fn it_is_not_opened_to_other_machines() {
    let authority = Authority::new();
    for listen in ["0.0.0.0:0", "[::]:0"] {
        let client = Client::new(authority.identity("operator"));
        let web = Web::bind(listen.parse().unwrap(), client, vec!["a:1".into()]).await;
        assert!(matches!(web, Err(WebError::NotLoopback { .. })), "{listen}");
    }
}

#[tokio::test]
async fn the_command_prints_the_address_and_ends_when_told() {
    let (served, _client, authority) = agent_and_client().await;
    let identity = authority.issue("somebody");
    let mut command = Command::new(env!("CARGO_BIN_EXE_godwit-scheduler"));
    command.args(["web", "--agent", &served.addr, "--identity"]).arg(&identity);
    let mut process = tokio::process::Command::from(command)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut printed = String::new();
    let mut out = process.stdout.take().unwrap();
    let until = async {
        while !printed.contains('\n') {
            let mut bytes = [0; 512];
            let len = out.read(&mut bytes).await.unwrap();
            assert_ne!(len, 0, "it ended: {printed}");
            printed += std::str::from_utf8(&bytes[..len]).unwrap();
        }
    };
    timeout(Duration::from_secs(30), until).await.expect("an address");
    let (addr, token) =
        printed.trim().strip_prefix("http://").unwrap().split_once("/?token=").unwrap();
    let page = Page { addr: addr.to_owned(), token: token.to_owned(), served, authority };
    assert_eq!(status(&page.with_cookie("/v1/state", "").await), 200);
    let pid = process.id().unwrap().to_string();
    assert!(Command::new("kill").arg(&pid).status().unwrap().success());
    let ended = timeout(Duration::from_secs(20), process.wait()).await.expect("an end").unwrap();
    assert!(ended.success(), "{ended}");
}
