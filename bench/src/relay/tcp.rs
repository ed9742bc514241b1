//! The relay's TCP: each connection is ended here and another one made to the target; bytes wait
//! for the delay in between. A pair of threads a direction, since connections are few.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::Counters;

/// Bytes of one read.
const CHUNK_BYTES: usize = 64 << 10;

/// Chunks under way in a direction of a connection: 64 MiB at most. Then the sender waits.
const CHUNKS: usize = 1024;

/// Most connections at a time; further ones are closed at once.
const CONNECTIONS_MAX: usize = 64;

/// Longest wait for the target.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

type Chunk = (Instant, Vec<u8>);

/// Passes on connections for ever. The target sees them in the order in which they were made: QEMU
/// 7.2 takes the first for the main one of multifd.
pub(crate) fn accept(
    listener: &TcpListener,
    to: SocketAddr,
    delay: Duration,
    counters: &Arc<Counters>,
) {
    let open = Arc::new(AtomicUsize::new(0));
    for connection in listener.incoming() {
        let Ok(client) = connection else {
            // Out of descriptors, most likely: some will be closed.
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        if open.load(Ordering::Relaxed) >= CONNECTIONS_MAX {
            continue;
        }
        let target = match connect(to) {
            Ok(target) => target,
            Err(error) => {
                eprintln!("relay: {error:#}");
                continue;
            }
        };
        open.fetch_add(1, Ordering::Relaxed);
        let (open, counters) = (Arc::clone(&open), Arc::clone(counters));
        std::thread::spawn(move || {
            serve(&client, &target, delay, &counters);
            open.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

fn connect(to: SocketAddr) -> Result<TcpStream> {
    TcpStream::connect_timeout(&to, CONNECT_TIMEOUT)
        .with_context(|| format!("The target {to} does not answer"))
}

/// Passes on one connection until both directions have ended.
fn serve(client: &TcpStream, target: &TcpStream, delay: Duration, counters: &Counters) {
    for stream in [client, target] {
        // Without it small messages wait for others: slower, but not wrong.
        drop(stream.set_nodelay(true));
    }
    std::thread::scope(|scope| {
        for (from, to) in [(client, target), (target, client)] {
            let (sender, receiver) = sync_channel(CHUNKS);
            scope.spawn(move || take(from, delay, &sender));
            scope.spawn(move || give(to, &receiver, counters));
        }
    });
}

/// Reads until the end, or until nobody takes what is read.
fn take(mut from: &TcpStream, delay: Duration, chunks: &SyncSender<Chunk>) {
    let mut bytes = vec![0; CHUNK_BYTES];
    loop {
        match from.read(&mut bytes) {
            Ok(0) => return,
            Ok(count) => {
                let chunk = bytes.get(..count).unwrap_or_default().to_vec();
                if chunks.send((Instant::now() + delay, chunk)).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Writes each chunk when it is due; the end is passed on, too.
fn give(mut to: &TcpStream, chunks: &Receiver<Chunk>, counters: &Counters) {
    for (due, chunk) in chunks {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        if to.write_all(&chunk).is_err() {
            // The reader of this direction notices at its next chunk, or with its peer's end.
            break;
        }
        Counters::add(&counters.tcp_bytes, chunk.len() as u64);
    }
    // It may be closed already.
    drop(to.shutdown(Shutdown::Write));
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn bytes_and_ends_pass_both_ways_after_the_delay() {
        let delay = Duration::from_millis(30);
        let (relay, target) = (listener(), listener());
        let (at, to) = (relay.local_addr().unwrap(), target.local_addr().unwrap());
        let counters = Arc::new(Counters::default());
        let own = Arc::clone(&counters);
        // Ends with the process of the test.
        std::thread::spawn(move || accept(&relay, to, delay, &own));
        let echo = std::thread::spawn(move || {
            let (mut stream, _) = target.accept().unwrap();
            let mut all = vec![];
            stream.read_to_end(&mut all).unwrap();
            stream.write_all(&all).unwrap();
        });
        let sent: Vec<u8> = (0..300_000_u32).map(|number| (number % 251) as u8).collect();
        let start = Instant::now();
        let mut client = TcpStream::connect(at).unwrap();
        client.write_all(&sent).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut back = vec![];
        client.read_to_end(&mut back).unwrap();
        assert!(start.elapsed() >= 2 * delay);
        echo.join().unwrap();
        assert_eq!(back, sent);
        assert_eq!(counters.tcp_bytes.load(Ordering::Relaxed), 600_000);
    }

    fn listener() -> TcpListener {
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()
    }
}
