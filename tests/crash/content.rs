//! What stands in a sector: the number of the operation that wrote it and the sector's own number, over and over, so
//! that whatever is read tells who wrote it, and a mix or a foreign sector is seen.

/// Bytes of a sector.
pub const SECTOR: u64 = 512;
/// Sectors of a block.
pub const SECTORS: u64 = 8;

/// The operation that wrote a sector; 0 for zeros.
pub type Value = u64;
/// A block's sectors.
pub type Sectors = [Value; SECTORS as usize];

/// `count` sectors from `first` on as operation `value` writes them.
pub fn fill(value: Value, first: u64, count: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity((count * SECTOR) as usize);
    for sector in first..first + count {
        for _ in 0..SECTOR / 16 {
            bytes.extend_from_slice(&value.to_le_bytes());
            bytes.extend_from_slice(&sector.to_le_bytes());
        }
    }
    bytes
}

/// The content of block `number` with these sectors.
pub fn fill_block(sectors: &Sectors, number: u64) -> [u8; (SECTOR * SECTORS) as usize] {
    let mut bytes = [0; (SECTOR * SECTORS) as usize];
    for (at, value) in sectors.iter().enumerate().filter(|(_, value)| **value != 0) {
        let at_bytes = at * SECTOR as usize;
        bytes[at_bytes..at_bytes + SECTOR as usize].copy_from_slice(&fill(*value, number * SECTORS + at as u64, 1));
    }
    bytes
}

/// Whether a block of the pool holds data for certain: a sector that some operation wrote.
pub fn is_data(bytes: &[u8]) -> bool {
    const OPERATIONS_MAX: u64 = 1 << 32;
    bytes.chunks_exact(SECTOR as usize).zip(0..).any(|(sector, at)| {
        let word = |at: usize| sector[at..at + 8].iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        let (value, number) = (word(0), word(8));
        value != 0 && value < OPERATIONS_MAX && number % SECTORS == at && sector[16..] == sector[..sector.len() - 16]
    })
}

/// Who wrote this sector.
pub fn parse(bytes: &[u8], sector: u64) -> Result<Value, String> {
    // Each 16 bytes equal those before them: one comparison, since this is done to all that is read of every state.
    let whole = bytes[16..] == bytes[..bytes.len() - 16];
    let word = |at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[at..at + 8]);
        u64::from_le_bytes(word)
    };
    let (value, number) = (word(0), word(8));
    if whole && (value, number) == (0, 0) {
        return Ok(0);
    }
    if !whole {
        return Err(format!("sector {sector} is a mix: it begins as sector {number} of operation {value}"));
    }
    if number != sector || value == 0 {
        return Err(format!("sector {sector} holds sector {number} of operation {value}"));
    }
    Ok(value)
}

/// What stands in block `number`, whose content is `bytes`.
pub fn parse_block(bytes: &[u8], number: u64) -> Result<Sectors, String> {
    let mut sectors = [0; SECTORS as usize];
    for (at, sector) in bytes.chunks_exact(SECTOR as usize).enumerate() {
        sectors[at] = parse(sector, number * SECTORS + at as u64)?;
    }
    Ok(sectors)
}

/// The blocks in `bytes`, the first of which is block `first`.
pub fn parse_blocks(bytes: &[u8], first: u64) -> Result<Vec<(u64, Sectors)>, String> {
    let blocks = bytes.chunks_exact((SECTOR * SECTORS) as usize).zip(first..);
    blocks.map(|(block, number)| Ok((number, parse_block(block, number)?))).collect()
}
