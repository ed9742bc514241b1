//! What a test guest looks like, and the QEMU command line that follows from it.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use crate::env::{Env, QemuKind};
use crate::ports;

/// Known to both QEMUs, so that guests can move between them.
pub const MACHINE: &str = "pc-i440fx-7.2";

/// Where the guest's command port lies: the third port's usual place.
pub(crate) const COMMAND_IOBASE: &str = "0x3e8";
/// An interrupt of its own: ISA ports that share one lose interrupts.
pub(crate) const COMMAND_IRQ: &str = "5";

/// Where the guest's RAM lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backend {
    /// A shared file on tmpfs: direct mode works.
    Tmpfs,
    /// A shared memfd.
    Memfd,
    /// Private anonymous memory: only stream mode works.
    Private,
    /// A shared file on the tmpfs mounted there ([`crate::ram_disk::RamDisk`]).
    TmpfsAt(PathBuf),
    /// A shared file on the hugetlbfs mounted there ([`crate::hugepages::HugePages`]).
    Hugetlb(PathBuf),
    /// Two NUMA nodes, each in a shared file on tmpfs.
    Numa2,
    /// Half of the memory as a DIMM; both in shared files on tmpfs.
    Dimm,
}

/// The guest's disk /dev/vda.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// A raw image ([`crate::disk::create`]).
    pub path: PathBuf,
    /// QEMU's cache mode: `none` is direct I/O, `writeback` is buffered.
    pub cache: String,
    /// `native`, `io_uring` or `threads`.
    pub aio: String,
}

/// The guest's network card eth0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// QEMU's `-netdev` without the id, such as `tap,ifname=t0,script=no,downscript=no`.
    pub netdev: String,
    /// Its hardware address.
    pub mac: String,
}

/// A guest to start. Fields that a migration needs equal on both ends are kept by
/// [`VmSpec::successor`].
#[derive(Debug, Clone)]
pub struct VmSpec {
    /// For error texts and file names.
    pub name: String,
    /// Which QEMU.
    pub qemu: QemuKind,
    /// RAM, all backends together.
    pub memory_mib: u64,
    /// What RAM has beside its MiB; see [`VmSpec::odd_memory`].
    pub extra_kib: u64,
    /// Virtual CPUs.
    pub smp: u32,
    /// Machine type.
    pub machine: String,
    /// Where RAM lies.
    pub backend: Backend,
    /// A disk.
    pub disk: Option<Disk>,
    /// A network card.
    pub nic: Option<Nic>,
    /// A balloon with free page reporting.
    pub balloon: bool,
    /// An initramfs instead of that of the environment.
    pub initrd: Option<PathBuf>,
    /// The newer kernel, which has no modules: no disk, no network, no balloon.
    pub newer_kernel: bool,
    /// Words for the guest's kernel command line: `godwit.writer=fill=100,hot=20`.
    pub cmdline: Vec<String>,
    /// Started with `-incoming defer`.
    pub incoming: bool,
    /// The network namespace that QEMU runs in.
    pub netns: Option<String>,
    /// The folders of control groups that QEMU runs in.
    pub cgroups: Vec<PathBuf>,
    /// Further arguments for QEMU.
    pub extra: Vec<String>,
    /// Environment variables for QEMU. Not kept by [`VmSpec::successor`].
    pub variables: Vec<(String, String)>,
}

impl VmSpec {
    /// A guest of 256 MiB in one shared file, one CPU, without disk and network.
    #[must_use]
    pub fn new(name: &str, qemu: QemuKind) -> Self {
        Self {
            name: name.to_owned(),
            qemu,
            memory_mib: 256,
            extra_kib: 0,
            smp: 1,
            machine: MACHINE.to_owned(),
            backend: Backend::Tmpfs,
            disk: None,
            nic: None,
            balloon: false,
            initrd: None,
            newer_kernel: false,
            cmdline: Vec::new(),
            incoming: false,
            netns: None,
            cgroups: Vec::new(),
            extra: Vec::new(),
            variables: Vec::new(),
        }
    }

    /// Sets the size of RAM.
    #[must_use]
    pub fn memory_mib(self, memory_mib: u64) -> Self {
        Self { memory_mib, ..self }
    }

    /// Gives RAM 8 KiB more. Under TCG, QEMU before 9.0 forgets writes while it migrates RAM whose size is a multiple of
    /// 256 KiB: it clears their marks, but not those in the processors' TLBs (its `cpu_physical_memory_sync_dirty_bitmap`
    /// by whole words; by single pages it is right). Guests that such a QEMU itself moves are given this.
    #[must_use]
    pub fn odd_memory(self) -> Self {
        Self { extra_kib: 8, ..self }
    }

    /// The size of RAM in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        (self.memory_mib * 1024 + self.extra_kib) * 1024
    }

    /// Sets the number of virtual CPUs.
    #[must_use]
    pub fn smp(self, smp: u32) -> Self {
        Self { smp, ..self }
    }

    /// Sets where RAM lies.
    #[must_use]
    pub fn backend(self, backend: Backend) -> Self {
        Self { backend, ..self }
    }

    /// Gives it a disk.
    #[must_use]
    pub fn disk(self, path: &Path, cache: &str, aio: &str) -> Self {
        let (path, cache, aio) = (path.to_owned(), cache.to_owned(), aio.to_owned());
        Self { disk: Some(Disk { path, cache, aio }), ..self }
    }

    /// Gives it a network card.
    #[must_use]
    pub fn nic(self, netdev: &str, mac: &str) -> Self {
        Self { nic: Some(Nic { netdev: netdev.to_owned(), mac: mac.to_owned() }), ..self }
    }

    /// Boots it from another initramfs.
    #[must_use]
    pub fn initrd(self, path: &Path) -> Self {
        Self { initrd: Some(path.to_owned()), ..self }
    }

    /// Boots the newer kernel of the environment.
    #[must_use]
    pub fn newer_kernel(self) -> Self {
        Self { newer_kernel: true, ..self }
    }

    /// Adds a program or another word to the kernel command line.
    #[must_use]
    pub fn with(mut self, word: &str) -> Self {
        self.cmdline.push(word.to_owned());
        self
    }

    /// Gives it a balloon with free page reporting.
    #[must_use]
    pub fn balloon(self) -> Self {
        Self { balloon: true, ..self }
    }

    /// Runs its QEMU in a network namespace.
    #[must_use]
    pub fn netns(self, name: &str) -> Self {
        Self { netns: Some(name.to_owned()), ..self }
    }

    /// Starts QEMU with the preloaded library, listening on `socket`.
    #[must_use]
    pub fn preload(mut self, library: &Path, socket: &Path) -> Self {
        let variables = [("LD_PRELOAD", library), ("GODWIT_PRELOAD_SOCKET", socket)];
        let variables = variables.map(|(name, path)| (name.to_owned(), path.display().to_string()));
        self.variables.extend(variables);
        self
    }

    /// Adds arguments for QEMU.
    #[must_use]
    pub fn extra(mut self, words: &[&str]) -> Self {
        self.extra.extend(words.iter().map(|&word| word.to_owned()));
        self
    }

    /// The same machine waiting for a guest (`-incoming defer`), with its own RAM and sockets and
    /// the same disk image, in `qemu`. Namespace and control groups are not taken over.
    #[must_use]
    pub fn successor(&self, name: &str, qemu: QemuKind) -> Self {
        let name = name.to_owned();
        let (cgroups, variables) = (Vec::new(), Vec::new());
        Self { name, qemu, incoming: true, netns: None, cgroups, variables, ..self.clone() }
    }

    /// RAM backends as (id, KiB).
    fn memory_parts(&self) -> Result<Vec<(&'static str, u64)>> {
        let kib = self.memory_bytes() / 1024;
        let in_two = matches!(self.backend, Backend::Numa2 | Backend::Dimm);
        if in_two && (!self.memory_mib.is_multiple_of(256) || self.extra_kib != 0) {
            bail!(
                "{} MiB and {} KiB in two parts are no multiple of 256 MiB",
                self.memory_mib,
                self.extra_kib
            );
        }
        Ok(if in_two { vec![("m0", kib / 2), ("m1", kib / 2)] } else { vec![("m0", kib)] })
    }

    /// The backends' files, if they have any; `stem` makes them unique.
    pub(crate) fn ram_files(&self, stem: &str) -> Result<Vec<PathBuf>> {
        let folder = match &self.backend {
            Backend::Memfd | Backend::Private => return Ok(Vec::new()),
            Backend::Hugetlb(mount) | Backend::TmpfsAt(mount) => mount.clone(),
            Backend::Tmpfs | Backend::Numa2 | Backend::Dimm => PathBuf::from("/dev/shm"),
        };
        let parts = self.memory_parts()?;
        Ok(parts.iter().map(|(id, _)| folder.join(format!("{stem}-{id}"))).collect())
    }

    fn memory_arguments(&self, stem: &str) -> Result<Vec<String>> {
        let parts = self.memory_parts()?;
        let files = self.ram_files(stem)?;
        let mut words = Vec::new();
        for (at, (id, kib)) in parts.iter().enumerate() {
            let object = match (&self.backend, files.get(at)) {
                (Backend::Private, _) => format!("memory-backend-ram,id={id},size={kib}K"),
                (Backend::Memfd, _) => {
                    format!("memory-backend-memfd,id={id},size={kib}K,share=on")
                }
                (_, Some(path)) => format!(
                    "memory-backend-file,id={id},size={kib}K,share=on,mem-path={}",
                    path.display()
                ),
                (_, None) => bail!("No file for {id}"),
            };
            words.extend(["-object".to_owned(), object]);
        }
        let (machine, memory) = (&self.machine, self.memory_mib);
        let kib = self.memory_bytes() / 1024;
        let plain = |words: &mut Vec<String>, memory: String, machine: String| {
            words.extend(["-m".to_owned(), memory, "-machine".to_owned(), machine]);
        };
        match self.backend {
            Backend::Numa2 => {
                plain(&mut words, format!("{memory}M"), machine.clone());
                let last = self.smp.max(2) - 1;
                for (node, cpus) in [(0, "0".to_owned()), (1, format!("1-{last}"))] {
                    let cpus = if self.smp < 2 && node == 1 {
                        String::new()
                    } else {
                        format!(",cpus={cpus}")
                    };
                    let numa = format!("node,nodeid={node},memdev=m{node}{cpus}");
                    words.extend(["-numa".to_owned(), numa]);
                }
            }
            Backend::Dimm => {
                let memory = format!("{}M,slots=2,maxmem={}M", memory / 2, memory * 2);
                plain(&mut words, memory, format!("{machine},memory-backend=m0"));
                words.extend(["-device".to_owned(), "pc-dimm,id=dimm0,memdev=m1".to_owned()]);
            }
            _ => plain(&mut words, format!("{kib}K"), format!("{machine},memory-backend=m0")),
        }
        Ok(words)
    }

    fn device_arguments(&self) -> Vec<String> {
        let mut words = Vec::new();
        if let Some(Disk { path, cache, aio }) = &self.disk {
            let path = path.display();
            words.extend([
                "-drive".to_owned(),
                format!("file={path},format=raw,if=none,id=disk0,cache={cache},aio={aio}"),
                "-device".to_owned(),
                "virtio-blk-pci,drive=disk0".to_owned(),
            ]);
        }
        if let Some(Nic { netdev, mac }) = &self.nic {
            words.extend([
                "-netdev".to_owned(),
                format!("{netdev},id=net0"),
                "-device".to_owned(),
                format!("virtio-net-pci,netdev=net0,mac={mac},romfile="),
            ]);
        }
        if self.balloon {
            let device = "virtio-balloon-pci,id=balloon0,free-page-reporting=on,deflate-on-oom=on";
            words.extend(["-device".to_owned(), device.to_owned()]);
        }
        words
    }

    /// Kernel and initramfs that it boots from.
    pub(crate) fn boot_files<'a>(&'a self, env: &'a Env) -> (&'a Path, &'a Path) {
        let (kernel, initrd) = match self.newer_kernel {
            false => (&env.kernel, &env.initrd),
            true => (&env.newer_kernel, &env.plain_initrd),
        };
        (kernel, self.initrd.as_ref().unwrap_or(initrd))
    }

    /// Its kernel's command line.
    pub(crate) fn kernel_cmdline(&self) -> String {
        let line = format!("console=ttyS0 panic=-1 loglevel=5 {}", self.cmdline.join(" "));
        line.trim_end().to_owned()
    }

    /// All of QEMU's arguments. `stem` names RAM files, `folder` holds the sockets.
    pub(crate) fn arguments(&self, env: &Env, stem: &str, folder: &Path) -> Result<Vec<String>> {
        let folder = folder.display();
        let serial = |name: &str, path: &str| {
            format!("socket,id={name},path={folder}/{path},server=on,wait=off")
        };
        let (kernel, initrd) = self.boot_files(env);
        let mut words: Vec<String> = [
            "-name",
            &format!("{},debug-threads=on", self.name),
            // Never KVM: a /dev/kvm that opens is no proof that a guest boots on it.
            "-accel",
            "tcg,thread=multi",
            "-smp",
            &format!("{0},sockets={0},cores=1,threads=1", self.smp),
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-chardev",
            &format!("file,id=console,path={folder}/{}", ports::CONSOLE),
            "-serial",
            "chardev:console",
            "-chardev",
            &serial("heartbeat", ports::HEARTBEAT),
            "-serial",
            "chardev:heartbeat",
            "-chardev",
            &serial("command", ports::COMMAND),
            "-device",
            &format!(
                "isa-serial,chardev=command,index=2,iobase={COMMAND_IOBASE},irq={COMMAND_IRQ}"
            ),
            "-qmp",
            &format!("unix:{folder}/qmp-engine.sock,server=on,wait=off"),
            "-qmp",
            &format!("unix:{folder}/qmp-test.sock,server=on,wait=off"),
            "-kernel",
            &kernel.to_string_lossy(),
            "-initrd",
            &initrd.to_string_lossy(),
            "-append",
            &self.kernel_cmdline(),
        ]
        .map(str::to_owned)
        .into();
        words.extend(self.memory_arguments(stem)?);
        words.extend(self.device_arguments());
        if self.incoming {
            words.extend(["-incoming".to_owned(), "defer".to_owned()]);
        }
        words.extend(self.extra.iter().cloned());
        Ok(words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(backend: Backend) -> VmSpec {
        VmSpec::new("test", QemuKind::V7_2).memory_mib(512).smp(2).backend(backend)
    }

    #[test]
    fn backends_become_arguments() {
        let words = |backend| spec(backend).memory_arguments("stem").unwrap().join(" ");
        let tmpfs = words(Backend::Tmpfs);
        assert!(tmpfs.contains("size=524288K,share=on,mem-path=/dev/shm/stem-m0"));
        assert!(tmpfs.contains("-machine pc-i440fx-7.2,memory-backend=m0"));
        assert!(!words(Backend::Private).contains("share"));
        assert!(words(Backend::Numa2).contains("nodeid=1,memdev=m1,cpus=1-1"));
        assert!(words(Backend::Dimm).contains("-m 256M,slots=2,maxmem=1024M"));
        let huge = words(Backend::Hugetlb("/huge".into()));
        assert!(huge.contains("mem-path=/huge/stem-m0"));
        let own = words(Backend::TmpfsAt("/own".into()));
        assert!(own.contains("share=on,mem-path=/own/stem-m0"));
        let odd = spec(Backend::Private).odd_memory().memory_arguments("stem").unwrap().join(" ");
        assert!(odd.contains("size=524296K") && odd.contains("-m 524296K"), "{odd}");
        assert!(spec(Backend::Numa2).odd_memory().memory_parts().is_err());
        assert!(spec(Backend::Numa2).memory_mib(300).memory_parts().is_err());
    }

    #[test]
    fn a_successor_waits_and_keeps_the_machine() {
        let first = spec(Backend::Tmpfs).disk(Path::new("/d"), "none", "native").netns("n");
        let next = first.successor("next", QemuKind::V10_0);
        assert!(next.incoming && next.netns.is_none());
        assert_eq!((next.disk, next.memory_mib), (first.disk, 512));
    }
}
