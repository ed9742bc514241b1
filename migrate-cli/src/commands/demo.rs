//! `migrate demo`.
use std::process::ExitCode;
use crate::args::DemoArgs;
pub(super) async fn run(_args: &DemoArgs) -> ExitCode { ExitCode::SUCCESS }
