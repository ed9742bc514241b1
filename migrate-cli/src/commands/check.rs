//! `migrate check`: what this host and VM can do, and what is missing.

use std::path::Path;
use std::process::ExitCode;

use qemu_glue::check::{Finding, Severity, host_findings};
use qemu_glue::qmp::Client;
use qemu_glue::ram::GuestRam;
use qemu_glue::vm::{self, VmInventory};

use crate::args::CheckArgs;
use crate::attaching;
use crate::error::EngineError;

pub(super) async fn run(args: &CheckArgs) -> ExitCode {
    println!("host");
    let mut findings = host_findings();
    print(&findings);
    if let Some(qmp) = &args.qmp {
        println!("VM at {}", qmp.display());
        let found = match look_at(qmp, args.preload_socket.as_deref()).await {
            Ok(found) => found,
            Err(error) => vec![Finding::blocker(
                error.tell(),
                "give the QMP socket of a QEMU on this host, with no other client on it",
            )],
        };
        print(&found);
        findings.extend(found);
    }
    let count =
        |is: fn(&Severity) -> bool| findings.iter().filter(|found| is(&found.severity)).count();
    let blockers = count(|severity| *severity == Severity::Blocker);
    if blockers > 0 {
        println!("a migration would fail: {blockers} thing(s) to put right");
        return ExitCode::from(1);
    }
    let indirect = count(|severity| *severity == Severity::Indirect);
    match (&args.qmp, indirect) {
        (None, 0) => println!("this host is ready; add --qmp SOCK to look at a VM"),
        (None, _) => println!("this host is ready for QEMU's stream, not for the direct path"),
        (Some(_), 0) => println!("a migration will work, by the direct path"),
        (Some(_), _) => {
            println!(
                "a migration will work, by QEMU's stream; {indirect} thing(s) stand against the direct path"
            );
        }
    }
    ExitCode::SUCCESS
}

async fn look_at(qmp: &Path, preload: Option<&Path>) -> Result<Vec<Finding>, EngineError> {
    let client = Client::connect(qmp).await?;
    let vm = vm::inventory(&client).await?;
    println!(
        "  {}: QEMU {}, {}, {} MiB in {} block(s), {}",
        vm.label(),
        vm.qemu,
        vm.machine,
        vm.ram_bytes() >> 20,
        vm.regions.len(),
        vm.status.state,
    );
    let mut findings = vm.blockers.clone();
    findings.extend(vm.notes.iter().cloned());
    findings.extend(attaching::probe(vm.pid, preload));
    findings.extend(direct_io(&vm));
    if !vm.regions.is_empty() {
        match GuestRam::open(vm.pid, &vm.regions, false) {
            Ok(_) => findings.push(Finding::ok("The guest's RAM can be read")),
            Err(error) => findings.push(Finding::indirect(
                EngineError::from(error).tell(),
                "run as the user that runs QEMU, or as root",
            )),
        }
    }
    Ok(findings)
}

fn direct_io(vm: &VmInventory) -> Option<Finding> {
    (!vm.direct_io.is_empty()).then(|| {
        Finding::ok(format!(
            "Direct I/O: {}; written pages are compared again before the guest is handed over",
            vm.direct_io.join(", ")
        ))
    })
}

fn print(findings: &[Finding]) {
    for finding in findings {
        let mark = match finding.severity {
            Severity::Ok => "ok  ",
            Severity::Note => "note",
            Severity::Warning => "WARN",
            Severity::Indirect => "path",
            _ => "FAIL",
        };
        println!("  {mark} {}", finding.what);
        if let Some(remedy) = &finding.remedy {
            println!("       -> {remedy}");
        }
    }
}
