//! A node of a volume's tree or of a table. Level, blocks of the pool, then the node.
//!
//! * Decoding never panics; what is accepted has the same bytes, and so has a node made of its entries anew.
//! * Its addresses lie inside the pool; a leaf of a volume holds no nodes, anything else no blocks.
//! * Memory: a small multiple of the input.
#![no_main]

use libfuzzer_sys::fuzz_target;
use plywood::format::{ENTRIES_PER_NODE, EntryKind, LEVEL_MAX, Node};
use plywood::units::Clock;
use plywood_fuzz::fields::Fields;
use plywood_fuzz::layout::Structure;
use plywood_fuzz::memory::{DECODER, bounded};
use plywood_fuzz::samples::POOL_BYTES;
use plywood_fuzz::seeds;

fn check(node: &Node, input: &[u8], pool_blocks: u64, mapped: EntryKind) {
    assert_eq!(node.bytes()[..], *input, "one encoding");
    let mut again = Node::new(Clock(1));
    for index in 0..ENTRIES_PER_NODE {
        let entry = node.entry(index);
        assert!(entry.kind == EntryKind::Hole || (entry.kind == mapped && entry.address.0 < pool_blocks));
        again.set(index, entry);
    }
    assert!(again == *node, "its entries are all that it says");
    assert_eq!(node.is_empty(), (0..ENTRIES_PER_NODE).all(|index| node.entry(index).kind == EntryKind::Hole));
}

fuzz_target!(
    init: seeds::offer(|| {
        let found = [Structure::Node, Structure::TableNode].into_iter().flat_map(seeds::blocks);
        let blocks = ((POOL_BYTES / 4096) as u32).to_le_bytes();
        found.map(|(found, block)| [&[found.level][..], &blocks, &block].concat()).collect()
    }),
    |input: &[u8]| bounded(DECODER, input.len(), || {
        let mut fields = Fields(input);
        let (level, pool_blocks) = (fields.byte() % (LEVEL_MAX + 2), u64::from(fields.u32()));
        if let Ok(node) = Node::decode(fields.0, level, pool_blocks) {
            check(&node, fields.0, pool_blocks, if level == 0 { EntryKind::Block } else { EntryKind::Node });
        }
        if let Ok(node) = Node::decode_table(fields.0, level, pool_blocks) {
            check(&node, fields.0, pool_blocks, EntryKind::Node);
        }
    })
);
