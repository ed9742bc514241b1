//! A UDP relay that can fall silent, as a cable that is pulled: neither end is told.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::net::UdpSocket;
use tokio::task::JoinHandle;

use crate::common::any_port;

pub(crate) struct Relay {
    pub(crate) addr: SocketAddr,
    silent: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Relay {
    pub(crate) async fn to(target: SocketAddr) -> Self {
        let front = Arc::new(UdpSocket::bind(any_port()).await.unwrap());
        let addr = front.local_addr().unwrap();
        let silent = Arc::new(AtomicBool::new(false));
        let task = tokio::spawn(forward(front, target, Arc::clone(&silent)));
        Self { addr, silent, task }
    }

    /// Drops every packet from now on.
    pub(crate) fn fall_silent(&self) {
        self.silent.store(true, Ordering::Relaxed);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn forward(front: Arc<UdpSocket>, target: SocketAddr, silent: Arc<AtomicBool>) {
    let mut backs: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
    let mut tasks = tokio::task::JoinSet::new();
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
