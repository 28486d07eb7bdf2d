//! Made-up tokens: prompts are cut into tokens of at most four bytes, answers are words whose tokens
//! are four bytes each.
//!
//! Pure and the same in every process. An answer sent back as part of the next prompt is cut into the same tokens, so
//! the prefix cache finds a conversation's history as it would with a real tokenizer. Four bytes per token is the
//! usual rule of thumb for English text; the counts are estimates, not a real tokenizer's.

/// Bytes of text per token.
pub(crate) const TOKEN_BYTES: usize = 4;

/// Tokens that stand for no text, as in `ChatML`. Numbers above any four bytes of UTF-8, where 0xFF never occurs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Special {
    /// `<|im_start|>`
    Start = 0xFFFF_FF01,
    /// `<|im_end|>`
    End = 0xFFFF_FF02,
    /// The line break after a role and after a message.
    Break = 0xFFFF_FF03,
}

/// Reads a prompt token by token and keeps what a request needs to know of it.
#[derive(Clone, Debug)]
pub(crate) struct Tokens {
    block_size: u32,
    state: u64,
    count: u32,
    block_hashes: Vec<u64>,
    /// The tokens themselves, where somebody wants them.
    kept: Option<Vec<u32>>,
}

impl Tokens {
    /// An empty prompt for an engine with blocks of `block_size` tokens (at least 1).
    pub(crate) fn new(block_size: u32) -> Self {
        Self {
            block_size: block_size.max(1),
            state: 0,
            count: 0,
            block_hashes: Vec::new(),
            kept: None,
        }
    }

    /// The same, and each of its tokens is kept.
    pub(crate) fn keeping(block_size: u32) -> Self {
        Self {
            kept: Some(Vec::new()),
            ..Self::new(block_size)
        }
    }

    /// The tokens that were kept.
    pub(crate) fn into_kept(self) -> Vec<u32> {
        self.kept.unwrap_or_default()
    }

    /// How many tokens were read.
    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// A number that depends on every token read.
    pub(crate) fn digest(&self) -> u64 {
        mix(self.state)
    }

    /// One key per full block, each standing for everything before it, too.
    pub(crate) fn into_block_hashes(self) -> Vec<u64> {
        self.block_hashes
    }

    /// Reads one token.
    pub(crate) fn push(&mut self, token: u32) {
        // Not a cryptographic hash: a forged collision only makes the simulated cache count a wrong hit.
        self.state =
            (self.state.rotate_left(23) ^ u64::from(token)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.count = self.count.saturating_add(1);
        if let Some(kept) = &mut self.kept {
            kept.push(token);
        }
        if self.count.is_multiple_of(self.block_size) {
            self.block_hashes.push(mix(self.state));
        }
    }

    /// Reads a special token.
    pub(crate) fn special(&mut self, token: Special) {
        self.push(token as u32);
    }

    /// Reads text, four bytes a token; the last token may be shorter.
    pub(crate) fn text(&mut self, text: &str) {
        for chunk in text.as_bytes().chunks(TOKEN_BYTES) {
            let mut bytes = [0; TOKEN_BYTES];
            bytes[..chunk.len()].copy_from_slice(chunk);
            self.push(u32::from_le_bytes(bytes));
        }
    }

    /// Reads one chat message in `ChatML`.
    pub(crate) fn message<'a>(&mut self, role: &str, content: impl Iterator<Item = &'a str>) {
        self.open(role);
        content.for_each(|part| self.text(part));
        self.close();
    }

    /// Reads the head of a message, such as the answer that is about to be generated.
    pub(crate) fn open(&mut self, role: &str) {
        self.special(Special::Start);
        self.text(role);
        self.special(Special::Break);
    }

    /// Reads the end of a message.
    pub(crate) fn close(&mut self) {
        self.special(Special::End);
        self.special(Special::Break);
    }
}

/// The finaliser of `MurmurHash3`: every input bit reaches every output bit.
fn mix(mut value: u64) -> u64 {
    value ^= value >> 33;
    value = value.wrapping_mul(0xFF51_AFD7_ED55_8CCD);
    value ^= value >> 33;
    value = value.wrapping_mul(0xC4CE_B9FE_1A85_EC53);
    value ^ (value >> 33)
}

/// One token each.
const SHORT: [&str; 16] = [
    "the ", "and ", "for ", "its ", "one ", "two ", "may ", "can ", "let ", "how ", "now ", "set ",
    "run ", "low ", "per ", "all ",
];
/// Two tokens each.
const MIDDLE: [&str; 16] = [
    "gateway ", "balance ", "channel ", "current ", "through ", "request ", "replica ", "decides ",
    "measure ", "pattern ", "passage ", "storage ", "traffic ", "between ", "control ", "outflow ",
];
/// Three tokens each.
const LONG: [&str; 8] = [
    "measurement ",
    "temperature ",
    "performance ",
    "partitioned ",
    "equilibrium ",
    "coefficient ",
    "continually ",
    "instruments ",
];

/// Which word and which third of it each token of a group of eight is.
const PATTERN: [(usize, usize); 8] = [
    (0, 0),
    (1, 0),
    (1, 1),
    (2, 0),
    (3, 0),
    (3, 1),
    (3, 2),
    (4, 0),
];

/// The answer to the prompt with one digest, as long as one likes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    digest: u64,
}

impl Answer {
    /// The answer to the prompt with this digest.
    pub(crate) fn new(digest: u64) -> Self {
        Self { digest }
    }

    /// Where the answer ends when nobody limits it: between 16 and 256 tokens.
    pub(crate) fn natural_tokens(self) -> u32 {
        16 + u32::try_from(mix(self.digest ^ 0xE0) % 241).unwrap_or(0)
    }

    /// The text of token `index`: four ASCII bytes that need no escaping in JSON.
    pub(crate) fn token(self, index: u32) -> &'static str {
        let group = u64::from(index / 8);
        let (word, part) = PATTERN[(index % 8) as usize];
        let choice = mix(self.digest ^ (group << 8) ^ word as u64);
        let pick = |words: &[&'static str]| -> &'static str {
            let index = choice % words.len() as u64;
            usize::try_from(index)
                .ok()
                .and_then(|index| words.get(index))
                .copied()
                .unwrap_or("the ")
        };
        let text = match word {
            1 => pick(&MIDDLE),
            3 => pick(&LONG),
            _ => pick(&SHORT),
        };
        text.get(part * TOKEN_BYTES..(part + 1) * TOKEN_BYTES)
            .unwrap_or("the ")
    }

    /// The first `tokens` tokens.
    pub(crate) fn text(self, tokens: u32) -> String {
        (0..tokens).map(|index| self.token(index)).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tokens(text: &str) -> Tokens {
        let mut tokens = Tokens::new(4);
        tokens.text(text);
        tokens
    }

    #[test]
    fn every_word_fills_its_tokens() {
        assert!(SHORT.iter().all(|word| word.len() == TOKEN_BYTES));
        assert!(MIDDLE.iter().all(|word| word.len() == 2 * TOKEN_BYTES));
        assert!(LONG.iter().all(|word| word.len() == 3 * TOKEN_BYTES));
    }

    #[test]
    fn four_bytes_make_a_token_and_a_rest_makes_one_more() {
        assert_eq!(tokens("").count(), 0);
        assert_eq!(tokens("abcd").count(), 1);
        assert_eq!(tokens("abcde").count(), 2);
    }

    #[test]
    fn history_of_a_conversation_keeps_its_block_hashes() {
        let mut first = Tokens::new(4);
        first.message("user", ["What flows through a penstock?"].into_iter());
        first.open("assistant");
        let answer = Answer::new(first.digest());
        let mut second = Tokens::new(4);
        second.message("user", ["What flows through a penstock?"].into_iter());
        second.message("assistant", [answer.text(40).as_str()].into_iter());
        second.message("user", ["And then?"].into_iter());
        for index in 0..40 {
            first.text(answer.token(index));
        }
        let (first, second) = (first.into_block_hashes(), second.into_block_hashes());
        assert!(first.len() > 10);
        assert_eq!(second[..first.len()], first);
    }

    proptest! {
        #[test]
        fn common_prefix_gives_common_hashes_and_no_more(a in "[a-z]{16,64}", b in "[a-z]{1,32}", c in "[a-z]{1,32}") {
            prop_assume!(b != c);
            let shared = a.len() / 16;
            let (left, right) = (tokens(&format!("{a}{b}")), tokens(&format!("{a}{c}")));
            prop_assert_ne!(left.digest(), right.digest());
            let (left, right) = (left.into_block_hashes(), right.into_block_hashes());
            prop_assert_eq!(&left[..shared], &right[..shared]);
            let longest = format!("{a}{b}").bytes().zip(format!("{a}{c}").bytes()).take_while(|(x, y)| x == y).count();
            let equal = left.iter().zip(&right).take_while(|(x, y)| x == y).count();
            prop_assert_eq!(equal, (longest / 16).min(left.len()).min(right.len()));
        }

        #[test]
        fn answer_is_plain_text_of_four_bytes_a_token(digest: u64, count in 0..600_u32) {
            let answer = Answer::new(digest);
            let text = answer.text(count);
            prop_assert_eq!(text.len(), count as usize * TOKEN_BYTES);
            prop_assert!(text.bytes().all(|byte| byte == b' ' || byte.is_ascii_lowercase()));
            prop_assert!((16..=256).contains(&answer.natural_tokens()));
        }
    }
}
