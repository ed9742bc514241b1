//! docs/openapi.json is what the code says, names every path, and what agents answer is as it says.
//!
//! `GODWIT_WRITE_GOLDEN=1` writes the file.

use std::collections::BTreeSet;
use std::path::Path;

use bytes::Bytes;
use hyper::Request;
use scheduler::api::openapi;
use scheduler_api::sample;
use serde_json::{Value, json};

use super::agent_and_client;

/// The paths that are served, without the page's.
const PATHS: [(&str, &str); 13] = [
    ("get", "/v1/state"),
    ("get", "/v1/hosts/{host}/history"),
    ("put", "/v1/hosts/{host}/drain"),
    ("delete", "/v1/hosts/{host}/drain"),
    ("get", "/v1/plan"),
    ("post", "/v1/moves"),
    ("delete", "/v1/moves/{guest}"),
    ("post", "/v1/receive"),
    ("delete", "/v1/receive/{guest}"),
    ("put", "/v1/guests/{guest}/memory"),
    ("put", "/v1/guests/{guest}/gray-box"),
    ("get", "/metrics"),
    ("get", "/openapi.json"),
];

const METHODS: [&str; 5] = ["get", "put", "post", "delete", "patch"];

fn description() -> Value {
    serde_json::from_str(&openapi::text().unwrap()).unwrap()
}

fn described() -> BTreeSet<(String, String)> {
    let description = description();
    let paths = description["paths"].as_object().unwrap();
    paths
        .iter()
        .flat_map(|(path, methods)| {
            let methods = methods.as_object().unwrap().keys().cloned();
            methods.map(|method| (method, path.clone())).collect::<Vec<_>>()
        })
        .collect()
}

#[test]
fn the_file_is_what_the_code_says() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi.json");
    let text = openapi::text().unwrap();
    if std::env::var_os("GODWIT_WRITE_GOLDEN").is_some() {
        std::fs::write(&file, &text).unwrap();
    }
    let written = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(
        written == text,
        "docs/openapi.json is old: GODWIT_WRITE_GOLDEN=1 cargo test -p scheduler --test api"
    );
}

#[test]
fn every_path_is_described() {
    let expected: BTreeSet<_> =
        PATHS.map(|(method, path)| (method.to_owned(), path.to_owned())).into();
    assert_eq!(described(), expected);
}

/// The paths above, with any method: what is described is served, and nothing else.
#[tokio::test]
async fn what_is_described_is_served_and_nothing_else() {
    let (served, client, _authority) = agent_and_client().await;
    let described = described();
    let paths: BTreeSet<_> = PATHS.map(|(_, path)| path).into();
    for path in paths {
        for method in METHODS {
            let uri = path.replace("{host}", "host-001").replace("{guest}", "vm-0001");
            let request = Request::builder().method(method.to_uppercase().as_str()).uri(uri);
            let request = request.body(Bytes::new()).unwrap();
            let answer = client.pass(&served.addr, None, request).await.unwrap();
            let is_served = !matches!(answer.status().as_u16(), 404 | 405);
            let is_described = described.contains(&(method.to_owned(), path.to_owned()));
            assert_eq!(is_served, is_described, "{method} {path}");
        }
    }
}

fn assert_is(name: &str, value: &Value) {
    let schema = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$ref": format!("#/components/schemas/{name}"),
        "components": description()["components"],
    });
    let validator = jsonschema::validator_for(&schema).unwrap();
    let errors: Vec<_> = validator.iter_errors(value).map(|error| error.to_string()).collect();
    assert!(errors.is_empty(), "{name}: {errors:?}");
}

#[tokio::test]
async fn answers_are_as_described() {
    let (served, client, _authority) = agent_and_client().await;
    let ask = async |method: &str, path: &str, body: Value| {
        let body = if body.is_null() { Bytes::new() } else { Bytes::from(body.to_string()) };
        let request = Request::builder().method(method).uri(path).body(body).unwrap();
        let answer = client.pass(&served.addr, None, request).await.unwrap();
        serde_json::from_slice::<Value>(answer.body()).unwrap()
    };
    assert_is("View", &ask("GET", "/v1/state", Value::Null).await);
    assert_is("HistoryView", &ask("GET", "/v1/hosts/host-001/history", Value::Null).await);
    assert_is("PlanView", &ask("GET", "/v1/plan", Value::Null).await);
    let request = json!({ "guest": sample::guest_name(5), "to": null });
    assert_is("MoveRequest", &request);
    assert_is("MoveAnswer", &ask("POST", "/v1/moves", request).await);
    let request = json!({ "guest": "vm-0005", "uuid": "" });
    assert_is("ReceiveRequest", &request);
    assert_is("ReceiveAnswer", &ask("POST", "/v1/receive", request).await);
    assert_is("ErrorBody", &ask("POST", "/v1/moves", json!({})).await);
    assert_eq!(ask("GET", "/openapi.json", Value::Null).await, description());
}

/// The schemas tell wrong answers from right ones.
#[test]
fn descriptions_are_strict_enough_to_fail() {
    let schema = json!({
        "$ref": "#/components/schemas/View", "components": description()["components"],
    });
    let validator = jsonschema::validator_for(&schema).unwrap();
    let mut view = serde_json::to_value(sample::view(3, 4, 0.0)).unwrap();
    assert!(validator.is_valid(&view));
    view["hosts"][0]["state"] = json!("gone");
    assert!(!validator.is_valid(&view));
    let mut view = serde_json::to_value(sample::view(3, 4, 0.0)).unwrap();
    view["hotspots"][0]["current"] = json!("much");
    assert!(!validator.is_valid(&view));
}
