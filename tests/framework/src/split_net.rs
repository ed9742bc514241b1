//! Hosts of a split guest: a source, a main host and memory servers, every two that talk joined by a
//! link of their own.
//!
//! ```text
//!            source
//!      link0 / |   \ link2 ...          every link is shaped alike, at both ends
//!       main   |    \
//!    page0 | \ | link1
//!          |  \ page1 ...
//!     server 0  server 1 ...
//! ```
//! A server has one address wherever one comes from: it lies on the server's loopback, and source and
//! main host have a route to it, each by its own link.

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result, ensure};

use crate::netns::{Netns, NetnsPair, join};

/// The source's devices: the first leads to the main host, the others to one server each.
const SOURCE_LINKS: [&str; 5] = ["link0", "link1", "link2", "link3", "link4"];

/// The main host's devices: one leads to each server.
const PAGE_LINKS: [&str; 4] = ["page0", "page1", "page2", "page3"];

/// The namespaces, removed on drop.
#[derive(Debug)]
pub struct SplitNet {
    /// The source's namespace.
    pub source: Netns,
    /// The main host's namespace.
    pub main: Netns,
    /// The memory servers' namespaces.
    pub servers: Vec<Netns>,
}

impl SplitNet {
    /// The main host's address for the source.
    pub const MAIN: Ipv4Addr = NetnsPair::DESTINATION;
    /// Most memory servers.
    pub const SERVERS_MAX: usize = PAGE_LINKS.len();

    /// Hosts whose links are shaped to `bits_per_s`, or not at all if it is 0.
    ///
    /// # Errors
    /// Not root, or more servers than [`Self::SERVERS_MAX`].
    pub fn create(servers: usize, bits_per_s: u64) -> Result<Self> {
        ensure!(servers <= Self::SERVERS_MAX, "At most {} memory servers", Self::SERVERS_MAX);
        let namespace = |number: usize| Netns::create(&format!("memory{number}"));
        let net = Self {
            source: Netns::create("source")?,
            main: Netns::create("target")?,
            servers: (0..servers).map(namespace).collect::<Result<_>>()?,
        };
        net.link((&net.source, SOURCE_LINKS[0], 0), &net.main, bits_per_s)?;
        for (number, server) in net.servers.iter().enumerate() {
            let address = Self::server(number);
            server.ip(&["addr", "add", &format!("{address}/32"), "dev", "lo"])?;
            let (from_source, from_main) = (SOURCE_LINKS[1..].get(number), PAGE_LINKS.get(number));
            let (from_source, from_main) = from_source.zip(from_main).context("No device")?;
            let subnet = u8::try_from(number)?;
            let ends =
                [(&net.source, *from_source, 1 + subnet), (&net.main, *from_main, 64 + subnet)];
            for end in ends {
                let gateway = net.link(end, server, bits_per_s)?.to_string();
                end.0.ip(&["route", "add", &format!("{address}/32"), "via", &gateway])?;
            }
        }
        Ok(net)
    }

    /// Joins two hosts and returns the other's address on this link.
    fn link(&self, one: (&Netns, &str, u8), other: &Netns, bits_per_s: u64) -> Result<Ipv4Addr> {
        let (one, device, subnet) = one;
        let [here, there] = [1, 2].map(|host| Ipv4Addr::new(10, 77, subnet, host));
        join((one, here), (other, there), device)?;
        one.shape(device, bits_per_s)?;
        other.shape(device, bits_per_s)?;
        Ok(there)
    }

    /// Address of a memory server, by its number from 0.
    #[must_use]
    pub fn server(number: usize) -> Ipv4Addr {
        Ipv4Addr::new(10, 78, 0, u8::try_from(number).unwrap_or(u8::MAX).saturating_add(1))
    }

    /// The source's devices, one a link.
    #[must_use]
    pub fn source_links(&self) -> &'static [&'static str] {
        SOURCE_LINKS.get(..=self.servers.len()).unwrap_or(&SOURCE_LINKS)
    }

    /// Bytes that all of the source's links have carried (from it, to it), with Ethernet headers.
    ///
    /// # Errors
    /// `ip` failed.
    pub fn source_bytes(&self) -> Result<(u64, u64)> {
        let mut sum = (0, 0);
        for device in self.source_links() {
            let (received, sent) = self.source.bytes(device)?;
            sum = (sum.0 + sent, sum.1 + received);
        }
        Ok(sum)
    }
}
