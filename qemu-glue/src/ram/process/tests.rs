//! Memory of a child process in several kinds.

use migrate_core::error::{Classify, ErrorBin};

use super::*;
use crate::ram::tests::{Kind, Writer};

const MIB: u64 = 1 << 20;

#[test]
fn private_memory_is_read_where_it_was_written() {
    let blocks = [(Kind::Private, 2 * MIB), (Kind::Memfd, MIB), (Kind::Private, MIB)];
    let mut child = Writer::start(&blocks, 4096);
    child.write(0, 5 * 4096 + 7, 11);
    child.write(1, MIB - 1, 22);
    child.write(2, 0, 33);
    let ram = ProcessRam::open(child.pid(), &child.regions).unwrap();
    assert_eq!(ram.layout().pages(), 1024);
    let byte = |ram: &ProcessRam, page, offset| {
        let mut byte = [0];
        ram.read_part(PageIndex(page), offset, &mut byte).map(|()| byte[0])
    };
    assert_eq!(byte(&ram, 5, 7).unwrap(), 11);
    assert_eq!(byte(&ram, 767, 4095).unwrap(), 22);
    assert_eq!(byte(&ram, 768, 0).unwrap(), 33);
    assert_eq!(ram.data_ranges().unwrap().iter().collect::<Vec<_>>(), [5, 767, 768]);
    assert_eq!(byte(&ram, 6, 0).unwrap(), 0);
    // From one block into the next, and beyond the last.
    for (page, bytes) in [(511, 4097), (1023, 4097), (1024, 1)] {
        let error = ram.read_part(PageIndex(page), 0, &mut vec![0; bytes]).unwrap_err();
        assert!(matches!(error, RamError::OutOfRange { .. }), "{error:?}");
    }
    // As another end numbers them, without the second block.
    let mut blocks = [2, 0].map(|block: usize| ram.layout().blocks()[block].clone()).to_vec();
    blocks.push(BlockSpec { name: "strange".into(), length_bytes: MIB, page_bytes: 4096 });
    let other = ram.numbered_by(&RamLayout::new(blocks).unwrap());
    assert_eq!((byte(&other, 0, 0).unwrap(), byte(&other, 256 + 5, 7).unwrap()), (33, 11));
    assert!(matches!(byte(&other, 768, 0).unwrap_err(), RamError::OutOfRange { .. }));
    assert_eq!(other.data_ranges().unwrap().iter().collect::<Vec<_>>(), [0, 256 + 5, 256 + 6]);
}

#[test]
fn a_process_that_is_gone_is_told() {
    let child = Writer::start(&[(Kind::Private, MIB)], 4096);
    let (pid, regions) = (child.pid(), child.regions.clone());
    let ram = ProcessRam::open(pid, &regions).unwrap();
    drop(child);
    let error = ram.read_part(PageIndex(0), 0, &mut [0; 8]).unwrap_err();
    assert!(matches!(error, RamError::Io { .. }), "{error:?}");
    let error = ProcessRam::open(pid, &regions).unwrap_err();
    assert!(matches!(error, RamError::Trace { .. }), "{error:?}");
    assert_eq!(error.bin(), ErrorBin::System);
}
