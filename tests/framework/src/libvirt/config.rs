//! What is in the folder of a host before its libvirtd starts, and how its init sets it up.

use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Context as _, Result};

use crate::netns::NetnsPair;

/// Debian's places.
pub(super) const LIBVIRTD: &str = "/usr/sbin/libvirtd";
pub(super) const VIRSH: &str = "/usr/bin/virsh";
pub(super) const QEMU_DRIVER: &str =
    "/usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so";

/// libvirtd's socket for `virsh` at its own host, within the host's folder.
pub(super) const SOCKET: &str = "run/libvirt/libvirt-sock";
/// libvirtd's own log.
pub(super) const LOG: &str = "var/log/libvirt/libvirtd.log";
/// Names of hosts and their addresses.
pub(super) const HOSTS: &str = "etc/hosts";
/// Folders with a guest's ports, one a domain.
pub(super) const GUESTS: &str = "var/lib/libvirt/guests";
/// The only driver that the daemon loads: the others would look at the machine's disks and devices.
const DRIVERS: &str = "var/lib/libvirt/drivers";

/// The first process of a host, with its folder, its name, libvirt's cache and libvirtd as arguments.
///
/// An empty file that is mounted read-only is a KVM that cannot be opened; libvirt would distrust
/// what it knows about QEMU if it could. The shell waits until libvirtd ends, and reaps what becomes
/// its child: QEMUs, which libvirt waits to see gone.
pub(super) const INIT: &str = r#"set -eu
# Where libvirt-daemon alone is installed, these are missing; they stay, and stay empty.
mkdir -p /var/lib/libvirt /var/log/libvirt /var/cache/libvirt
for path in /etc/libvirt /var/lib/libvirt /var/log/libvirt /etc/passwd /etc/group /etc/hosts; do
    mount --bind "$1$path" "$path"
done
mount --bind "$3" /var/cache/libvirt
if [ -e /dev/kvm ]; then
    mount --bind "$1/no-kvm" /dev/kvm
    mount -o remount,bind,ro /dev/kvm
fi
# The last one: the folder itself may lie in there.
mount --bind "$1/run" /run
echo "$2" > /proc/sys/kernel/hostname
LIBVIRT_DRIVER_DIR=/var/lib/libvirt/drivers "$4" --listen &
wait $!
"#;

/// libvirt's user for QEMU must exist although QEMU runs as root.
const PASSWD: &str = "root:x:0:0::/root:/bin/sh\nlibvirt-qemu:x:64055:64055::/:/bin/false\n";
const GROUP: &str = "root:x:0:\nlibvirt-qemu:x:64055:\n";

/// Ownership is left alone: kernel and initramfs belong to the build. The machine's root may be
/// needed to read them.
const QEMU_CONF: &str = r#"user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
clear_emulator_capabilities = 0
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
"#;

/// Who a host is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Host {
    /// Its name, which the other one can resolve.
    pub(super) name: &'static str,
    /// Its address.
    pub(super) address: Ipv4Addr,
    /// First and last port where its QEMUs wait for guests. No port of the other's: at each host a
    /// gateway listens on all ports of the other one.
    pub(super) ports: (u16, u16),
    uuid: &'static str,
}

impl Host {
    /// The source of a pair.
    pub(super) const SOURCE: Self = Self {
        name: "host-a",
        address: NetnsPair::SOURCE,
        ports: (49152, 49215),
        uuid: "8d1b2c60-0000-4000-8000-0000000000a1",
    };
    /// The destination of a pair.
    pub(super) const DESTINATION: Self = Self {
        name: "host-b",
        address: NetnsPair::DESTINATION,
        ports: (49216, 49279),
        uuid: "8d1b2c60-0000-4000-8000-0000000000b2",
    };

    fn libvirtd_conf(&self) -> String {
        let Self { address, uuid, .. } = self;
        format!(
            "listen_tls = 0\n\
             listen_tcp = 1\n\
             listen_addr = \"{address}\"\n\
             auth_tcp = \"none\"\n\
             auth_unix_ro = \"none\"\n\
             auth_unix_rw = \"none\"\n\
             host_uuid = \"{uuid}\"\n\
             log_outputs = \"3:file:/{LOG}\"\n"
        )
    }

    /// What it calls itself where streams of guests are to go.
    pub(super) fn migration_name(&self) -> String {
        format!("{}.migration", self.name)
    }

    fn qemu_conf(&self) -> String {
        let (first, last) = self.ports;
        let name = self.migration_name();
        format!(
            "{QEMU_CONF}migration_host = \"{name}\"\n\
             migration_port_min = {first}\nmigration_port_max = {last}\n"
        )
    }

    /// Fills the host's folder.
    pub(super) fn furnish(&self, root: &Path) -> Result<()> {
        for folder in ["etc/libvirt", "var/log/libvirt", "run", GUESTS, DRIVERS] {
            let path = root.join(folder);
            std::fs::create_dir_all(&path).with_context(|| format!("Cannot create {path:?}"))?;
        }
        let hosts: String = [Self::SOURCE, Self::DESTINATION]
            .map(|host| {
                let Self { address, name, .. } = host;
                format!("{address} {name}\n{address} {}\n", host.migration_name())
            })
            .concat();
        let files = [
            ("etc/passwd", PASSWD),
            ("etc/group", GROUP),
            (HOSTS, &format!("127.0.0.1 localhost\n{hosts}")),
            ("etc/libvirt/libvirtd.conf", &self.libvirtd_conf()),
            ("etc/libvirt/qemu.conf", &self.qemu_conf()),
            ("no-kvm", ""),
        ];
        for (name, text) in files {
            let path = root.join(name);
            std::fs::write(&path, text).with_context(|| format!("Cannot write {path:?}"))?;
        }
        let driver = Path::new(QEMU_DRIVER);
        let link = root.join(DRIVERS).join(driver.file_name().unwrap_or_default());
        std::os::unix::fs::symlink(driver, &link).with_context(|| format!("Cannot create {link:?}"))
    }
}
