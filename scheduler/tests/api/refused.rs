//! Who is not let in, and what is not taken.

use std::time::Duration;

use bytes::Bytes;
use hyper::{Method, Request, StatusCode};
use scheduler::api::{ApiError, Client};
use scheduler_api::control::ErrorBody;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{Authority, agent_and_client};

#[tokio::test]
async fn a_certificate_of_another_authority_is_refused() {
    let (served, _client, _authority) = agent_and_client().await;
    let stranger = Client::new(Authority::new().identity("operator"));
    let error = stranger.drain(&served.addr, None, "host-002", true).await.unwrap_err();
    assert!(matches!(error, ApiError::Unavailable { .. }), "{error}");
    assert!(served.agent.asked().is_empty());
}

#[tokio::test]
async fn no_certificate_is_refused() {
    let (served, _client, _authority) = agent_and_client().await;
    // curl is no dependency: a TLS client without a certificate, that believes any server.
    let config = rustls_without_certificate();
    let connector = tokio_rustls::TlsConnector::from(config);
    let stream = TcpStream::connect(served.socket()).await.unwrap();
    let name = rustls::pki_types::ServerName::try_from("host-001").unwrap();
    // In TLS 1.3 the client is done before the server has refused it: reading says so.
    let answer = async {
        let mut stream = connector.connect(name, stream).await?;
        stream.write_all(b"PUT /v1/hosts/host-002/drain HTTP/1.1\r\nHost: x\r\n\r\n").await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        std::io::Result::Ok(answer)
    };
    let error = answer.await.unwrap_err().to_string();
    assert!(error.contains("CertificateRequired"), "{error}");
    assert!(served.agent.asked().is_empty());
}

#[tokio::test]
async fn an_agent_of_another_name_is_not_asked() {
    let (served, client, _authority) = agent_and_client().await;
    let error = client.drain(&served.addr, Some("host-009"), "h", true).await.unwrap_err();
    assert!(error.to_string().contains("host-009"), "{error}");
    assert!(served.agent.asked().is_empty());
}

#[tokio::test]
async fn a_plain_request_is_told_what_to_do() {
    let (served, _client, _authority) = agent_and_client().await;
    let mut stream = TcpStream::connect(served.socket()).await.unwrap();
    stream.write_all(b"GET /v1/state HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    assert!(answer.contains("client certificate"), "{answer}");
    assert!(!answer.contains("host-"), "{answer}");
}

#[tokio::test]
async fn whoever_says_nothing_is_cut_off() {
    let (served, client, _authority) = agent_and_client().await;
    let mut silent = TcpStream::connect(served.socket()).await.unwrap();
    client.state(&served.addr, None).await.unwrap();
    let mut end = [0];
    let within = scheduler::api::server::HANDSHAKE_WITHIN + Duration::from_secs(5);
    let read = timeout(within, silent.read(&mut end)).await.expect("it must be cut off");
    assert!(matches!(read, Ok(0) | Err(_)));
}

async fn status(
    client: &Client,
    addr: &str,
    request: Request<Bytes>,
) -> (StatusCode, Option<ErrorBody>) {
    let answer = client.pass(addr, None, request).await.unwrap();
    (answer.status(), serde_json::from_slice(answer.body()).ok())
}

#[tokio::test]
async fn bodies_that_make_no_sense_change_nothing() {
    let (served, client, _authority) = agent_and_client().await;
    let long = format!("{{\"guest\":\"{}\"}}", "x".repeat(70_000));
    for (path, body, expected) in [
        ("/v1/moves", "", 400),
        ("/v1/moves", "{}", 400),
        ("/v1/moves", r#"{"guest": "a", "force": true}"#, 400),
        ("/v1/moves", "[[[[[[", 400),
        ("/v1/moves", long.as_str(), 400),
        ("/v1/receive", r#"{"guest": 1}"#, 400),
    ] {
        let request = Request::post(path).body(Bytes::from(body.to_owned())).unwrap();
        let (found, error) = status(&client, &served.addr, request).await;
        assert_eq!(found.as_u16(), expected, "{path} {body:.60}");
        assert!(!error.unwrap().error.is_empty());
    }
    assert!(served.agent.asked().is_empty());
}

#[tokio::test]
async fn other_paths_methods_and_names_say_why_as_json() {
    let (served, client, _authority) = agent_and_client().await;
    let long = format!("/v1/hosts/{}/drain", "x".repeat(200));
    for (method, path, expected) in [
        (Method::GET, "/nothing", 404),
        (Method::GET, "/v1/hosts/a%2Fb/nothing", 404),
        (Method::POST, "/v1/state", 405),
        (Method::GET, "/v1/moves", 405),
        (Method::PUT, "/v1/hosts/%FF/drain", 400),
        (Method::PUT, "/v1/hosts/a%0Ab/drain", 400),
        (Method::PUT, long.as_str(), 400),
    ] {
        let request = Request::builder().method(&method).uri(path).body(Bytes::new()).unwrap();
        let (found, error) = status(&client, &served.addr, request).await;
        assert_eq!(found.as_u16(), expected, "{method} {path:.60}");
        assert!(!error.unwrap().error.is_empty());
    }
    assert!(served.agent.asked().is_empty());
}

#[tokio::test]
async fn a_browser_acts_for_no_other_site() {
    let (served, client, _authority) = agent_and_client().await;
    let own = format!("https://{}", served.addr);
    for (name, value, expected) in [
        ("origin", "https://evil.example", 403),
        ("origin", "null", 403),
        ("sec-fetch-site", "cross-site", 403),
        ("sec-fetch-site", "same-site", 403),
        ("sec-fetch-site", "same-origin", 204),
        ("origin", own.as_str(), 204),
    ] {
        let request = Request::put("/v1/hosts/host-002/drain").header(name, value);
        let request = request.body(Bytes::new()).unwrap();
        let (found, _) = status(&client, &served.addr, request).await;
        assert_eq!(found.as_u16(), expected, "{name}: {value}");
    }
    assert_eq!(served.agent.asked().len(), 2);
}

fn rustls_without_certificate() -> std::sync::Arc<rustls::ClientConfig> {
    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use rustls::{DigitallySignedStruct, Error, SignatureScheme};

    #[derive(Debug)]
    struct Any;

    impl ServerCertVerifier for Any {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ED25519, SignatureScheme::ECDSA_NISTP256_SHA256]
        }
    }

    let mut config = rustls::ClientConfig::builder_with_provider(std::sync::Arc::new(
        rustls::crypto::ring::default_provider(),
    ))
    .with_protocol_versions(&[&rustls::version::TLS13])
    .unwrap()
    .dangerous()
    .with_custom_certificate_verifier(std::sync::Arc::new(Any))
    .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    std::sync::Arc::new(config)
}
