//! The description of the API for other programs: docs/openapi.json is what [`text`] says.

use utoipa::openapi::security::SecurityScheme;
use utoipa::{Modify, OpenApi};

use super::routes;

/// Everything that can be asked.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Godwit's scheduler",
        description = "What an agent of godwit-scheduler tells and is asked. Any agent may be asked about the whole cluster. \
            Times are seconds since 1970 on the answering agent's clock.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    paths(
        routes::state, routes::history, routes::plan, routes::begin_move, routes::abort_move, routes::drain,
        routes::undrain, routes::receive, routes::stop_receiving, routes::resize, routes::set_gray_box,
        routes::metrics, routes::openapi_json,
    ),
    tags(
        (name = "look", description = "What is"),
        (name = "act", description = "What people may ask"),
        (name = "figures", description = "What applications say of themselves"),
        (name = "agents", description = "What only agents ask each other"),
    ),
    security(("certificate" = [])),
    modifiers(&Certificates),
)]
struct Description;

struct Certificates;

impl Modify for Certificates {
    fn modify(&self, description: &mut utoipa::openapi::OpenApi) {
        let scheme = SecurityScheme::MutualTls {
            description: Some("A certificate that `migrate pki issue` made".to_owned()),
            deprecated: None,
            extensions: None,
        };
        let components = description.components.get_or_insert_default();
        components.add_security_scheme("certificate", scheme);
    }
}

/// As JSON, in OpenAPI 3.1.
///
/// # Errors
/// It cannot be written, in words.
pub fn text() -> Result<String, String> {
    let mut text = Description::openapi().to_pretty_json().map_err(|error| error.to_string())?;
    text.push('\n');
    Ok(text)
}
