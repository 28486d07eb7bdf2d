//! Keys that callers show: what they look like, and the hash that stands for one wherever it is known.
//!
//! A key has 192 random bits, so nobody finds it by trying. What travels and is stored is its HMAC-SHA-256 under a
//! secret of the gateway (the pepper): who reads a config can neither use a key nor tell whether two gateways know the
//! same one.

use std::fmt;
use std::fmt::Write as _;

use ring::hmac;

/// What keys begin with. Clients that look for `sk-` find it, and so do scanners for secrets.
pub const PREFIX: &str = "sk-penstock-";
/// Random bytes of a key.
pub const RANDOM_BYTES: usize = 24;
/// Random bytes of a pepper: as long as the hash (RFC 2104, 3).
pub const PEPPER_BYTES: usize = 32;
/// Keys that somebody else made are at least this long.
pub const MIN_FOREIGN_BYTES: usize = 20;
/// Longer texts are no keys.
pub const MAX_BYTES: usize = 256;

/// A hash of a key.
pub type Hash = [u8; 32];

/// Writes a key down.
pub fn text(random: [u8; RANDOM_BYTES]) -> String {
    format!("{PREFIX}{}", hexadecimal(&random))
}

/// Bytes in lower-case hexadecimal digits.
pub fn hexadecimal(bytes: &[u8]) -> String {
    let digits = String::with_capacity(2 * bytes.len());
    bytes.iter().fold(digits, |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The hash that [`hexadecimal`] wrote.
pub fn read_hash(text: &str) -> Option<Hash> {
    let mut hash = Hash::default();
    if text.len() != 2 * hash.len() || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    for (byte, digits) in hash.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(hash)
}

/// Hashes keys under one pepper.
#[derive(Clone)]
pub struct Hasher(hmac::Key);

impl Hasher {
    /// Under `pepper`.
    pub fn new(pepper: &[u8]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, pepper))
    }

    /// The hash of a key.
    pub fn hash(&self, key: &[u8]) -> Hash {
        let mut hash = Hash::default();
        // A tag of HMAC-SHA-256 is as long.
        hash.copy_from_slice(hmac::sign(&self.0, key).as_ref());
        hash
    }
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hasher(***)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_long_and_begin_alike() {
        let key = text([0xa5; RANDOM_BYTES]);
        assert_eq!(key, format!("sk-penstock-{}", "a5".repeat(24)));
        assert!(key.len() <= MAX_BYTES && key.len() >= MIN_FOREIGN_BYTES);
    }

    /// RFC 4231, test case 2.
    #[test]
    fn the_hash_is_hmac_sha_256() {
        let hash = Hasher::new(b"Jefe").hash(b"what do ya want for nothing?");
        let text = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843";
        assert_eq!(hexadecimal(&hash), text);
        assert_eq!(read_hash(text), Some(hash));
        for wrong in [
            &text[2..],
            &text.replace('5', "g"),
            &format!("{text}00"),
            "é",
        ] {
            assert_eq!(read_hash(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_pepper_is_never_shown() {
        assert_eq!(format!("{:?}", Hasher::new(b"pepper")), "Hasher(***)");
    }
}
