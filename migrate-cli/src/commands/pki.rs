//! `migrate pki`.

use std::process::ExitCode;

use transport::pki::{self, InitOptions, IssueOptions};

use crate::args::PkiCommand;

pub(super) fn run(command: &PkiCommand) -> ExitCode {
    let done = match command {
        PkiCommand::Init { dir, days } => {
            let options = InitOptions { days: *days, ..InitOptions::default() };
            pki::init(dir, &options).map(|()| {
                format!(
                    "authority created in {}; keep {} safe and off the hosts",
                    dir.display(),
                    dir.join(pki::CA_KEY).display()
                )
            })
        }
        PkiCommand::Issue { dir, name, days } => {
            let options = IssueOptions { days: *days, ..IssueOptions::default() };
            pki::issue(dir, name, &options)
                .map(|out| format!("identity of {name} in {}; copy it to that host", out.display()))
        }
    };
    match done {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            let error = anyhow::Error::from(error);
            eprintln!("error: {error:#}");
            ExitCode::from(1)
        }
    }
}
