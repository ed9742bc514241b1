//! What the client asks and the server answers.

use bytes::Bytes;
use hyper::{Request, StatusCode};
use scheduler::api::ApiError;
use scheduler_api::control::{MoveRequest, ReceiveRequest, ResizeRequest};
use scheduler_api::figures::GrayBox;
use scheduler_api::sample;

use super::agent_and_client;

const NAME: Option<&str> = Some("host-001");

#[tokio::test]
async fn everything_reaches_the_agent_as_it_was_asked() {
    let (served, client, _authority) = agent_and_client().await;
    let addr = served.addr.as_str();
    let guest = "web/../1 ü%2F<b>";
    client.abort_move(addr, NAME, guest).await.unwrap();
    client.drain(addr, NAME, "host-002", true).await.unwrap();
    client.drain(addr, None, "..", false).await.unwrap();
    let receive = ReceiveRequest { guest: guest.into(), uuid: "u-1".into() };
    let answer = client.receive(addr, NAME, &receive).await.unwrap();
    assert_eq!(answer.addr, "127.0.0.1:7700");
    client.stop_receiving(addr, NAME, guest).await.unwrap();
    client.resize(addr, NAME, guest, &ResizeRequest { to_mib: 512.5 }).await.unwrap();
    let figures = GrayBox { served_per_s: 12.5, ..GrayBox::default() };
    client.set_gray_box(addr, NAME, guest, &figures).await.unwrap();
    let request = MoveRequest {
        guest: sample::MARKUP.into(),
        to: Some("host-003".into()),
        reason: "r".into(),
    };
    let begun = client.begin_move(addr, NAME, &request).await.unwrap();
    assert_eq!((begun.from.as_str(), begun.to.as_str()), ("host-001", "host-003"));
    assert_eq!(
        served.agent.asked(),
        [
            format!("operator: abort {guest}"),
            "operator: drain host-002".into(),
            "operator: undrain ..".into(),
            format!("operator: receive {guest} u-1"),
            format!("operator: stop receiving {guest}"),
            format!("operator: resize {guest} to 512.5 MiB"),
            format!("operator: {guest} serves 12.5"),
            format!("operator: move {} to Some(\"host-003\") (r)", sample::MARKUP),
        ]
    );
}

#[tokio::test]
async fn views_arrive_whole() {
    let (served, client, _authority) = agent_and_client().await;
    let addr = served.addr.as_str();
    assert_eq!(client.state(addr, NAME).await.unwrap(), sample::view(4, 20, sample::AT_S));
    assert_eq!(
        client.history(addr, NAME, "host-002").await.unwrap(),
        sample::history("host-002", sample::AT_S)
    );
    assert_eq!(client.propose(addr, NAME).await.unwrap(), sample::plan(sample::AT_S));
}

#[tokio::test]
async fn refusals_keep_their_kind_and_words() {
    let (served, client, _authority) = agent_and_client().await;
    let addr = served.addr.as_str();
    let what = || "Because \"so\"".to_owned();
    for refusal in [
        ApiError::BadRequest { what: what() },
        ApiError::Forbidden { what: what() },
        ApiError::NotFound { what: what() },
        ApiError::Conflict { what: what() },
        ApiError::Unavailable { what: what() },
    ] {
        served.agent.refuse(Some(refusal.clone()));
        assert_eq!(client.drain(addr, NAME, "host-002", true).await, Err(refusal));
    }
    let unknown = client.history(addr, NAME, "nobody").await.unwrap_err();
    assert!(matches!(unknown, ApiError::NotFound { what } if what.contains("nobody")));
}

#[tokio::test]
async fn a_state_that_has_not_changed_is_not_told_again() {
    let (served, client, _authority) = agent_and_client().await;
    let ask = async |etag: Option<&str>| {
        let mut request = Request::get("/v1/state");
        if let Some(etag) = etag {
            request = request.header("if-none-match", etag);
        }
        let request = request.body(Bytes::new()).unwrap();
        client.pass(&served.addr, NAME, request).await.unwrap()
    };
    let first = ask(None).await;
    let etag = first.headers()["etag"].to_str().unwrap().to_owned();
    let second = ask(Some(&etag)).await;
    assert_eq!(second.status(), StatusCode::NOT_MODIFIED);
    assert!(second.body().is_empty());
    served.agent.set(sample::view(4, 20, sample::AT_S + 5.0));
    let third = ask(Some(&etag)).await;
    assert_eq!(third.status(), StatusCode::OK);
    assert_ne!(third.headers()["etag"].to_str().unwrap(), etag);
}

#[tokio::test]
async fn an_agent_that_ends_lets_go_of_its_port() {
    let (mut served, client, _authority) = agent_and_client().await;
    client.state(&served.addr, NAME).await.unwrap();
    served.stop.take().unwrap().send(()).unwrap();
    served.serving.await.unwrap().unwrap();
    let error = client.state(&served.addr, NAME).await.unwrap_err();
    assert!(matches!(error, ApiError::Unavailable { what } if what.contains("refused")));
}
