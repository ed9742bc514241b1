//! A relay that can fall silent, as a cable that is pulled: neither end is told.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;

use crate::common::any_port;

pub(crate) struct Relay {
    pub(crate) addr: SocketAddr,
    silent: Arc<AtomicBool>,
    _udp: JoinSet<()>,
    tcp: JoinSet<()>,
}

impl Relay {
    /// Carries UDP and TCP.
    pub(crate) async fn to(target: SocketAddr) -> Self {
        let (mut relay, listener) = loop {
            let relay = Self::of_udp(target).await;
            match TcpListener::bind(relay.addr).await {
                Ok(listener) => break (relay, listener),
                // Somebody has the TCP port of that number.
                Err(error) if error.kind() == ErrorKind::AddrInUse => {}
                Err(error) => panic!("{error}"),
            }
        };
        relay.tcp.spawn(forward_tcp(listener, target, Arc::clone(&relay.silent)));
        relay
    }

    /// Carries UDP alone: TCP is refused.
    pub(crate) async fn of_udp(target: SocketAddr) -> Self {
        let front = Arc::new(UdpSocket::bind(any_port()).await.unwrap());
        let addr = front.local_addr().unwrap();
        let silent = Arc::new(AtomicBool::new(false));
        let mut udp = JoinSet::new();
        udp.spawn(forward(front, target, Arc::clone(&silent)));
        Self { addr, silent, _udp: udp, tcp: JoinSet::new() }
    }

    /// Closes all TCP connections, without the end that TLS gives them.
    pub(crate) fn cut_tcp(&mut self) {
        self.tcp.abort_all();
    }

    /// Drops every packet from now on.
    pub(crate) fn fall_silent(&self) {
        self.silent.store(true, Ordering::Relaxed);
    }
}

async fn forward(front: Arc<UdpSocket>, target: SocketAddr, silent: Arc<AtomicBool>) {
    let mut backs: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
    let mut tasks = JoinSet::new();
    let mut packet = vec![0; 65_536];
    loop {
        let (bytes, from) = front.recv_from(&mut packet).await.unwrap();
        if silent.load(Ordering::Relaxed) {
            continue;
        }
        if let Entry::Vacant(free) = backs.entry(from) {
            let back = Arc::new(UdpSocket::bind(any_port()).await.unwrap());
            back.connect(target).await.unwrap();
            free.insert(Arc::clone(&back));
            let (front, silent) = (Arc::clone(&front), Arc::clone(&silent));
            tasks.spawn(async move {
                let mut packet = vec![0; 65_536];
                while let Ok(bytes) = back.recv(&mut packet).await {
                    if !silent.load(Ordering::Relaxed) {
                        let _lost = front.send_to(&packet[..bytes], from).await;
                    }
                }
            });
        }
        let _lost = backs[&from].send(&packet[..bytes]).await;
    }
}

async fn forward_tcp(listener: TcpListener, target: SocketAddr, silent: Arc<AtomicBool>) {
    let mut tasks = JoinSet::new();
    loop {
        let (front, _) = listener.accept().await.unwrap();
        let (near, far) = front.into_split();
        let (back_near, back_far) = TcpStream::connect(target).await.unwrap().into_split();
        for (mut from, mut to) in [(near, back_far), (back_near, far)] {
            let silent = Arc::clone(&silent);
            tasks.spawn(async move {
                let mut bytes = vec![0; 65_536];
                while let Ok(read @ 1..) = from.read(&mut bytes).await {
                    if silent.load(Ordering::Relaxed) || to.write_all(&bytes[..read]).await.is_err()
                    {
                        // Nothing more is read, and nobody is told.
                        std::future::pending::<()>().await;
                    }
                }
                let _ended = to.shutdown().await;
            });
        }
    }
}
