//! What libvirt is told about a test guest.

use anyhow::{Result, ensure};

use super::config::GUESTS;
use crate::env::Env;
use crate::ports;
use crate::spec::{Backend, COMMAND_IOBASE, COMMAND_IRQ, VmSpec};

/// The domain's definition. Its RAM is what libvirt gives a domain unless it is asked for more:
/// private anonymous memory.
pub(super) fn definition(env: &Env, spec: &VmSpec) -> Result<String> {
    ensure!(spec.backend == Backend::Private, "A domain's RAM is private, not {:?}", spec.backend);
    ensure!(
        spec.disk.is_none() && spec.nic.is_none() && !spec.balloon,
        "A domain has no disk, network card or balloon"
    );
    ensure!(
        spec.extra.is_empty() && spec.variables.is_empty() && !spec.incoming,
        "What libvirt starts takes no arguments, variables or -incoming from the test"
    );
    let (kernel, initrd) = spec.boot_files(env);
    let [name, machine, kernel, initrd, cmdline, emulator] = [
        spec.name.as_str(),
        &spec.machine,
        &kernel.to_string_lossy(),
        &initrd.to_string_lossy(),
        &spec.kernel_cmdline(),
        &env.qemu(spec.qemu)?.bin.to_string_lossy(),
    ]
    .map(escaped);
    let (memory_mib, cpus) = (spec.memory_mib, spec.smp);
    let folder = format!("/{GUESTS}/{name}");
    let (console, heartbeat, command) = (ports::CONSOLE, ports::HEARTBEAT, ports::COMMAND);
    Ok(format!(
        "<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>{memory_mib}</memory>
  <vcpu>{cpus}</vcpu>
  <os>
    <type arch='x86_64' machine='{machine}'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initrd}</initrd>
    <cmdline>{cmdline}</cmdline>
  </os>
  <features><acpi/></features>
  <on_reboot>destroy</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>{emulator}</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <audio id='1' type='none'/>
    <serial type='file'>
      <source path='{folder}/{console}' append='off'/>
      <target type='isa-serial' port='0'/>
    </serial>
    <serial type='unix'>
      <source mode='bind' path='{folder}/{heartbeat}'/>
      <target type='isa-serial' port='1'/>
    </serial>
    <serial type='unix'>
      <source mode='bind' path='{folder}/{command}'/>
      <target type='isa-serial' port='2'/>
      <address type='isa' iobase='{COMMAND_IOBASE}' irq='{COMMAND_IRQ}'/>
    </serial>
  </devices>
</domain>
"
    ))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('\'', "&apos;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::QemuKind;

    fn env() -> Env {
        serde_json::from_str(
            "{\"kernel\": \"/k\", \"initrd\": \"/a&b\", \"newer_kernel\": \"/n\", \
             \"plain_initrd\": \"/p\", \"etcd\": \"/e\", \"qemu\": {\"7.2\": {\"bin\": \"/q\", \"data\": \"/d\"}}}",
        )
        .unwrap()
    }

    #[test]
    fn tells_what_the_guest_is() {
        let spec = VmSpec::new("one", QemuKind::V7_2).backend(Backend::Private).with("godwit.a=1");
        let text = definition(&env(), &spec).unwrap();
        for part in [
            "<name>one</name>",
            "<memory unit='MiB'>256</memory>",
            "<initrd>/a&amp;b</initrd>",
            "loglevel=5 godwit.a=1</cmdline>",
            "path='/var/lib/libvirt/guests/one/heartbeat.sock'",
            "<emulator>/q</emulator>",
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }

    #[test]
    fn what_a_domain_has_not_is_refused() {
        let spec = VmSpec::new("one", QemuKind::V7_2);
        let refused = |spec: VmSpec| definition(&env(), &spec).is_err();
        assert!(refused(spec.clone()), "shared RAM");
        let spec = spec.backend(Backend::Private);
        assert!(refused(spec.clone().balloon()));
        assert!(refused(spec.clone().extra(&["-S"])));
        assert!(refused(spec.successor("two", QemuKind::V7_2)));
    }
}
