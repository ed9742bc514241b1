//! QEMU's own post-copy: whether it is possible, when it begins, and how a guest is taken back from it.
//!
//! From the switch on, QEMU at the source keeps its guest in `finish-migrate`, where it does not let it run, and without
//! its connection the migration waits in `postcopy-paused`. 10.0 refuses to cancel it; 7.2 takes the command and, if it
//! waits already, never comes to an end (`cancelling`). So the migration is brought to its good end instead: it is
//! resumed into a connection of ours, at the other end of which all pages count as there:
//!
//! ```text
//!   migrate, resume ──► RECV_BITMAP (a block) … ──►        QEMU: postcopy-recover
//!                  ◄── its bitmap: all there … ◄──
//!                  ──► POSTCOPY_RESUME ──►
//!                  ◄── RESUME_ACK ◄──                      QEMU: postcopy-active, nothing left
//!                  ──► the end of RAM, of the stream ──►
//!                  ◄── SHUT ◄──                            QEMU: completed
//! ```
//!
//! `SHUT` before the end of the stream would let QEMU 7.2 close the connection over which it still writes.
//!
//! Its memory was never given away, so what is left is a guest in `postmigrate`, which `cont` resumes with its disks.
//!
//! Invariant: nothing here decides that a guest is taken back. Who calls [`leave_postcopy`] knows that it never ran, and
//! never will run, at the destination: its pages are not sent any more.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use migrate_core::layout::PAGE_BYTES;
use tokio::time::{Instant, sleep, timeout};
use tracing::debug;

use super::save::settle;
use super::whole::give_socket;
use super::{
    DESCRIPTOR_NAME, DeviceStateError, SETTLE_INTERVAL, drop_descriptor, refuse_active,
    socket_failed, wait_completed,
};
use crate::qmp::{Client, MigrationStatus, QmpError};
use crate::stream::grammar::{TYPE_END, TYPE_FOOTER};
use crate::stream::return_path::ReturnMessage;
use crate::vm::hmp;

/// Longest time that QEMU may take to notice that its connection has ended, and to come to its end after that.
const LEAVES_WITHIN: Duration = Duration::from_secs(10);

/// How long QEMU before 8.2 may need to notice the end of its return path once it says that it waits. Until then that
/// thread would take a new connection for the old one, and end it (migration/migration.c, `source_return_path_thread`).
/// Later ones wait for the thread first (`postcopy_pause`).
const RETURN_PATH_PAUSES_WITHIN: Duration = Duration::from_millis(100);

/// Bytes of a command's header in the stream: type, number, length of the body.
const HEADER_BYTES: usize = 5;

/// `QEMU_VM_COMMAND`.
const TYPE_COMMAND: u8 = 8;

/// `MIG_CMD_POSTCOPY_RESUME`.
const POSTCOPY_RESUME: u16 = 9;

/// `MIG_CMD_RECV_BITMAP`.
const RECV_BITMAP: u16 = 10;

/// Bytes with which a stream ends after the last pages: a footer and the end.
const END_BYTES: usize = 6;

/// How long nothing follows what ends a stream.
const QUIET: Duration = Duration::from_millis(10);

/// Bytes read at once of what nobody needs.
const READ_BYTES: usize = 64 << 10;

/// Why QEMU's post-copy is not possible for a VM, with the remedy; nothing if it is. A QEMU that waits for a guest finds
/// that out of its host.
///
/// # Errors
/// A [`DeviceStateError`]: QEMU was not asked.
pub async fn postcopy_obstacle(client: &Client) -> Result<Option<String>, DeviceStateError> {
    let blocks = ramblocks(client).await?;
    if let Some(block) = blocks.iter().find(|block| block.page_bytes != PAGE_BYTES as u64) {
        return Ok(Some(format!(
            "RAM block {} lies in pages of {} bytes, and QEMU's post-copy is carried in pages of {PAGE_BYTES} only: \
             start the VM with other RAM at both ends",
            block.name, block.page_bytes
        )));
    }
    let _turn = client.migration_turn().await;
    refuse_active(client).await?;
    let known = client.capabilities().await?;
    let Some(&before) = known.get("postcopy-ram") else {
        return Ok(Some("this QEMU has no capability postcopy-ram: use a newer one".into()));
    };
    // The others that it excludes are switched off for the time of a migration.
    let excluded = ["x-ignore-shared", "multifd", "background-snapshot", "mapped-ram"];
    let excluded = excluded.into_iter().filter(|name| known.get(*name) == Some(&true));
    let mut changes: Vec<(&str, bool)> = excluded.map(|name| (name, false)).collect();
    changes.push(("postcopy-ram", true));
    let tried = client.set_capabilities(&changes).await;
    let back: Vec<(&str, bool)> = changes
        .iter()
        .map(|(name, on)| (*name, if *name == "postcopy-ram" { before } else { !on }))
        .collect();
    match tried {
        Ok(()) => client.set_capabilities(&back).await.map(|()| None).map_err(Into::into),
        Err(QmpError::Command { desc, .. }) => Ok(Some(format!(
            "QEMU says \"{desc}\": it needs userfaultfd (sysctl vm.unprivileged_userfaultfd=1, or CAP_SYS_PTRACE for \
             QEMU) and RAM that is private or on tmpfs; its own log may say more"
        ))),
        Err(error) => Err(error.into()),
    }
}

/// Whether a migration in this state has been handed over by post-copy and is not over.
pub fn is_postcopy(status: &MigrationStatus) -> bool {
    use MigrationStatus::{
        PostcopyActive, PostcopyDevice, PostcopyPaused, PostcopyRecover, PostcopyRecoverSetup,
    };
    matches!(
        status,
        PostcopyActive | PostcopyDevice | PostcopyPaused | PostcopyRecover | PostcopyRecoverSetup
    )
}

/// Whether QEMU's migration here is in post-copy.
///
/// # Errors
/// What QMP says.
pub async fn is_in_postcopy(client: &Client) -> Result<bool, DeviceStateError> {
    Ok(client.query_migrate().await?.status.is_some_and(|status| is_postcopy(&status)))
}

/// Takes the guest back from a post-copy that is to come to nothing. It is stopped then, and `cont` resumes it. Does
/// nothing where QEMU's migration is not in post-copy.
///
/// # Errors
/// A [`DeviceStateError`]: QEMU has not come to the end of its migration. This can be tried again.
pub async fn leave_postcopy(client: &Client) -> Result<(), DeviceStateError> {
    let _turn = client.migration_turn().await;
    if !paused(client).await? {
        return Ok(());
    }
    if !client.version().at_least(8, 2) {
        sleep(RETURN_PATH_PAUSES_WITHIN).await;
    }
    let blocks = ramblocks(client).await?;
    let lengths = blocks.into_iter().map(|block| (block.name, block.used_bytes)).collect();
    let mut events = client.subscribe();
    let socket = give_socket(client).await?;
    if let Err(error) = client.migrate_resume_fd(DESCRIPTOR_NAME).await {
        drop_descriptor(client).await;
        return Err(error.into());
    }
    let ours = socket.try_clone().map_err(socket_failed("setting it up"))?;
    let taking = tokio::task::spawn_blocking(move || take_nothing(&ours, &lengths));
    let completed = timeout(LEAVES_WITHIN, wait_completed(client, &mut events)).await;
    // Whoever still reads or writes there is woken.
    let _ended_already = socket.shutdown(std::net::Shutdown::Both);
    if let Ok(Err(error)) = taking.await {
        debug!(%error, "the connection into nothing");
    }
    match completed {
        Ok(Ok(())) => {}
        // However it ended, it is over: its memory is here all the same.
        Ok(Err(error)) if !is_in_postcopy(client).await? => {
            debug!(%error, "the migration into nothing failed");
        }
        Ok(Err(error)) => return Err(error),
        Err(_elapsed) => return Err(DeviceStateError::Timeout { waited: LEAVES_WITHIN }),
    }
    settle(client).await?;
    Ok(())
}

/// Waits until a migration in post-copy has noticed that its connection ended; false if it is not in post-copy.
async fn paused(client: &Client) -> Result<bool, DeviceStateError> {
    let until = Instant::now() + LEAVES_WITHIN;
    let mut was_told = false;
    loop {
        match client.query_migrate().await?.status {
            Some(MigrationStatus::PostcopyPaused) => return Ok(true),
            Some(status) if is_postcopy(&status) => {}
            _ => return Ok(false),
        }
        if Instant::now() > until {
            return Err(DeviceStateError::Timeout { waited: LEAVES_WITHIN });
        }
        // Nobody is at the other end any more.
        if !std::mem::replace(&mut was_told, true)
            && let Err(error) = client.migrate_pause().await
        {
            debug!(%error, "QEMU pauses by itself");
        }
        sleep(SETTLE_INTERVAL).await;
    }
}

pub(super) async fn ramblocks(client: &Client) -> Result<Vec<hmp::RamBlock>, DeviceStateError> {
    let text = client.hmp(hmp::RAMBLOCK).await?;
    let blocks = hmp::ramblocks(&text);
    blocks.map_err(|error| DeviceStateError::Failed { detail: error.to_string() })
}

/// The other end of a resumed migration, at which every page of these blocks is there already. Blocks.
fn take_nothing(mut socket: &UnixStream, lengths: &BTreeMap<String, u64>) -> io::Result<()> {
    loop {
        let mut header = [0; HEADER_BYTES];
        socket.read_exact(&mut header)?;
        let [kind, number_high, number_low, length_high, length_low] = header;
        let number = u16::from_be_bytes([number_high, number_low]);
        let mut body = vec![0; usize::from(u16::from_be_bytes([length_high, length_low]))];
        if kind != TYPE_COMMAND {
            return Err(io::Error::other(format!("element {kind} where a command was due")));
        }
        socket.read_exact(&mut body)?;
        let mut answer = Vec::new();
        match number {
            RECV_BITMAP => all_there(&body, lengths, &mut answer)?,
            POSTCOPY_RESUME => put(ReturnMessage::ResumeAck(1), &mut answer)?,
            // Such as PING, to which nobody waits for an answer.
            _ => continue,
        }
        socket.write_all(&answer)?;
        if number == POSTCOPY_RESUME {
            break;
        }
    }
    take_end(socket)
}

/// Takes the end of a stream in which no page is left, and says that it was heard.
fn take_end(mut socket: &UnixStream) -> io::Result<()> {
    let (mut rest, mut last) = (vec![0; READ_BYTES], Vec::new());
    socket.set_read_timeout(Some(QUIET))?;
    loop {
        match socket.read(&mut rest) {
            Ok(0) => return Ok(()),
            Ok(count) => {
                last.extend_from_slice(rest.get(..count).unwrap_or_default());
                last.drain(..last.len().saturating_sub(END_BYTES));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // The footer of RAM with its number, and the end.
                if matches!(last.as_slice(), [TYPE_FOOTER, _, _, _, _, TYPE_END]) {
                    let mut answer = Vec::new();
                    put(ReturnMessage::Shut { error: 0 }, &mut answer)?;
                    socket.write_all(&answer)?;
                    last.clear();
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Says of the block that a command names that all of its pages have arrived.
fn all_there(body: &[u8], lengths: &BTreeMap<String, u64>, answer: &mut Vec<u8>) -> io::Result<()> {
    let name = body.get(1..).and_then(|name| std::str::from_utf8(name).ok());
    let known = name.and_then(|name| lengths.get_key_value(name));
    let (block, bytes) = known.ok_or_else(|| io::Error::other("a block that is not known"))?;
    let bits = bytes.div_ceil(PAGE_BYTES as u64);
    let size_bytes = bits.div_ceil(64) * 8;
    put(ReturnMessage::RecvBitmap { block }, answer)?;
    put(ReturnMessage::BitmapSize(size_bytes), answer)?;
    answer.resize(answer.len().saturating_add(usize::try_from(size_bytes).unwrap_or(0)), 0xff);
    put(ReturnMessage::BitmapEnd, answer)
}

fn put(message: ReturnMessage<'_>, out: &mut Vec<u8>) -> io::Result<()> {
    message.write(out).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::return_path::ReturnReader;

    #[test]
    fn a_resumed_migration_is_told_that_all_pages_are_there() {
        let (ours, mut qemus) = UnixStream::pair().unwrap();
        let lengths = [("ram".to_owned(), 4096 * 65), ("rom".to_owned(), 4096)];
        let taking = std::thread::spawn(move || take_nothing(&ours, &lengths.into()));
        qemus.write_all(&[8, 0, 10, 0, 4, 3, b'r', b'a', b'm']).unwrap();
        qemus.write_all(&[8, 0, 9, 0, 0]).unwrap();
        // What is left after that, in pieces.
        for piece in [&[3, 0, 0, 0, 1][..], &[0, 0, 0, 0, 0, 0, 0, 16, 0x7e, 0, 0, 0, 1, 0]] {
            std::thread::sleep(QUIET * 3);
            qemus.write_all(piece).unwrap();
        }
        let mut said = vec![0; 4 + 4 + 8 + 16 + 8 + 8 + 8];
        qemus.read_exact(&mut said).unwrap();
        let (mut input, mut reader, mut bits) = (&said[..], ReturnReader::new(), 0);
        let mut heard = vec![];
        while let Some(message) = reader.next(&mut input).unwrap() {
            match message {
                ReturnMessage::BitmapBits(bytes) => {
                    assert!(bytes.iter().all(|byte| *byte == 0xff));
                    bits += bytes.len();
                }
                other => heard.push(format!("{other:?}")),
            }
        }
        assert_eq!(bits, 16, "a whole number of words");
        let wanted = [
            r#"RecvBitmap { block: "ram" }"#,
            "BitmapSize(16)",
            "BitmapEnd",
            "ResumeAck(1)",
            "Shut { error: 0 }",
        ];
        assert_eq!(heard, wanted);
        drop(qemus);
        taking.join().unwrap().unwrap();
    }

    #[test]
    fn a_block_that_is_not_known_ends_it() {
        let (ours, mut qemus) = UnixStream::pair().unwrap();
        qemus.write_all(&[8, 0, 10, 0, 2, 1, b'x']).unwrap();
        assert!(take_nothing(&ours, &BTreeMap::new()).is_err());
    }
}
