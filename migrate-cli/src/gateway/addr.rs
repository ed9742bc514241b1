//! Where QEMUs connect, or listen, as it is typed.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Most ports that one address may name.
const PORTS_MAX: u16 = 1024;

/// Where libvirt lets QEMUs listen unless it is told otherwise (qemu.conf: `migration_port_min` and `_max`).
pub const LIBVIRT_PORTS: (u16, u16) = (49152, 49215);

/// Where QEMUs connect, or listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum QemuAddr {
    /// A Unix socket.
    Unix(PathBuf),
    /// TCP.
    Tcp {
        /// Name or address.
        host: String,
        /// First and last port.
        ports: Option<(u16, u16)>,
    },
}

impl QemuAddr {
    /// The port of the QEMU here for one that connected to `port` there; nothing if that is none of these.
    pub fn port_for(&self, port: u16) -> Option<u16> {
        match self {
            Self::Unix(_) => Some(0),
            Self::Tcp { ports: Some((first, last)), .. } if first == last => Some(*first),
            Self::Tcp { ports, .. } => {
                let (first, last) = ports.unwrap_or(LIBVIRT_PORTS);
                (first..=last).contains(&port).then_some(port)
            }
        }
    }
}

impl FromStr for QemuAddr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return match path {
                "" => Err("a path has to follow unix:".into()),
                path => Ok(Self::Unix(path.into())),
            };
        }
        let text = text.strip_prefix("tcp:").unwrap_or(text);
        let (host, ports) = match text.strip_prefix('[') {
            Some(rest) => {
                let (host, rest) = rest.split_once(']').ok_or("a ] is missing")?;
                match rest.strip_prefix(':') {
                    None if rest.is_empty() => (host, None),
                    None => return Err(format!("{rest:?} follows the ]")),
                    Some(ports) => (host, Some(ports)),
                }
            }
            None => match text.split_once(':') {
                // An IPv6 address.
                Some((_, rest)) if rest.contains(':') => (text, None),
                Some((host, ports)) => (host, Some(ports)),
                None => (text, None),
            },
        };
        if host.is_empty() {
            return Err("a host is missing before the port".into());
        }
        let ports = ports.map(parse_ports).transpose()?;
        Ok(Self::Tcp { host: host.to_owned(), ports })
    }
}

fn parse_ports(text: &str) -> Result<(u16, u16), String> {
    let port = |text: &str| {
        let port = text.parse::<u16>().ok().filter(|port| *port > 0);
        port.ok_or_else(|| format!("{text:?} is no port"))
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (port(first)?, port(last)?);
    if last < first || last - first >= PORTS_MAX {
        return Err(format!("{first}-{last}: 1 to {PORTS_MAX} ports, the first one first"));
    }
    Ok((first, last))
}

impl fmt::Display for QemuAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (host, ports) = match self {
            Self::Unix(path) => return write!(f, "unix:{}", path.display()),
            Self::Tcp { host, ports } => (host, ports),
        };
        match host.contains(':') {
            true => write!(f, "[{host}]")?,
            false => f.write_str(host)?,
        }
        match ports {
            None => Ok(()),
            Some((first, last)) if first == last => write!(f, ":{first}"),
            Some((first, last)) => write!(f, ":{first}-{last}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, ports: Option<(u16, u16)>) -> QemuAddr {
        QemuAddr::Tcp { host: host.into(), ports }
    }

    #[test]
    fn addresses_are_read_and_shown() {
        for (text, addr) in [
            ("unix:/run/a", QemuAddr::Unix("/run/a".into())),
            ("127.0.0.1:4444", tcp("127.0.0.1", Some((4444, 4444)))),
            ("host:49152-49215", tcp("host", Some((49152, 49215)))),
            ("host", tcp("host", None)),
            ("[::1]", tcp("::1", None)),
            ("[fe80::1]:1-7", tcp("fe80::1", Some((1, 7)))),
        ] {
            assert_eq!(text.parse(), Ok(addr.clone()));
            assert_eq!(addr.to_string(), text);
        }
        assert_eq!("tcp:h:1".parse(), Ok(tcp("h", Some((1, 1)))));
        assert_eq!("::1".parse(), Ok(tcp("::1", None)));
        for bad in
            ["unix:", "", ":7", "h:", "h:0", "h:9-8", "h:1-2000", "h:x", "[::1", "[::1]7", "[]:7"]
        {
            assert!(bad.parse::<QemuAddr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_port_leads_to_the_same_one_unless_one_is_named() {
        let port_for = |text: &str, port| text.parse::<QemuAddr>().unwrap().port_for(port);
        assert_eq!(port_for("unix:/run/a", 49152), Some(0));
        assert_eq!(port_for("h:7", 49152), Some(7));
        assert_eq!(port_for("h:7", 0), Some(7));
        assert_eq!(port_for("h:7-9", 8), Some(8));
        assert_eq!(port_for("h:7-9", 6), None);
        // Other services of that host are none of its business.
        assert_eq!(
            [22, 0, 49152, 49216].map(|port| port_for("h", port)),
            [None, None, Some(49152), None]
        );
    }
}
