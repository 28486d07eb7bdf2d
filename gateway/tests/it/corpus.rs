//! Everything odd that was ever met, in `gateway/corpus`: streams at every split point, bodies through every reader,
//! and both with mistakes made in them by chance. A case that fails once is added there. `PROPTEST_CASES=100000` makes
//! the search a long one.

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use bytes::Bytes;
use http::HeaderMap;
use penstock_gateway::cache::canonical::canonical;
use penstock_gateway::events::{Care, Events};
use penstock_gateway::meter::Meter;
use penstock_gateway::multipart;
use penstock_gateway::openai::{Call, Wire};
use penstock_gateway::provider::foreign::{About, Foreign, Vectors};
use penstock_gateway::provider::{Rest, Way};
use penstock_gateway::sse::Decoder;
use proptest::prelude::*;

fn corpus(folder: &str) -> Vec<(String, Vec<u8>)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(folder);
    let files = fs::read_dir(path).unwrap().map(|entry| {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        (name, fs::read(path).unwrap())
    });
    let files: Vec<_> = files.collect();
    assert!(files.len() > 10);
    files
}

/// `None`: an event is too large.
fn decoded(pieces: &[&[u8]]) -> Option<Vec<Vec<u8>>> {
    let mut decoder = Decoder::default();
    let mut events = Vec::new();
    for piece in pieces {
        let fed = decoder.feed(piece, |data, _| events.push(data.to_vec()));
        fed.ok()?;
    }
    Some(events)
}

/// What a meter says at the end, as text.
fn metered(wire: Wire, pieces: &[&[u8]]) -> Option<String> {
    let mut meter = Meter::new(wire);
    let mut tokens = 0;
    for piece in pieces {
        tokens += meter.feed(piece).ok()?.tokens;
    }
    let (done, started) = (meter.is_done(), meter.has_started());
    let (cut, usage) = (meter.cut(), meter.usage());
    Some(format!("{tokens} {done} {started} {cut:?} {usage:?}"))
}

/// What goes on to a caller who wants texts only, up to the end, by lines. Several empty ones are as good as one: half
/// of a line end may be the last byte, or stand behind what was left out.
fn passed(pieces: &[&[u8]]) -> Option<Vec<String>> {
    let care = Care {
        wants_count: false,
        stands_gaps: true,
        choices: 1,
    };
    let mut events = Events::new(Wire::Chunks, care);
    let mut out = Vec::new();
    for piece in pieces {
        let passed = events.feed(Bytes::copy_from_slice(piece)).ok()?;
        out.extend_from_slice(&passed.bytes);
        if passed.ends {
            break;
        }
    }
    let out = String::from_utf8_lossy(&out).replace("\r\n", "\n");
    let mut lines: Vec<String> = out.split(['\n', '\r']).map(str::to_owned).collect();
    lines.dedup_by(|next, line| next.is_empty() && line.is_empty());
    Some(lines)
}

fn translated(way: Way, pieces: &[&[u8]]) -> Option<Vec<u8>> {
    let mut translator = way.stream(7, true)?;
    let mut out = Vec::new();
    for piece in pieces {
        out.extend_from_slice(&translator.feed(piece).ok()?);
    }
    Some(out)
}

/// The same, as if a provider with a protocol of its own had sent it.
fn chunks_of(foreign: Foreign, pieces: &[&[u8]]) -> Option<Vec<u8>> {
    let about = About {
        created: 7,
        id: "id",
        model: "m",
        vectors: Vectors::default(),
    };
    let mut headers = HeaderMap::new();
    let kind = match foreign {
        Foreign::Bedrock => "application/vnd.amazon.eventstream",
        _ => "text/event-stream",
    };
    headers.insert("content-type", http::HeaderValue::from_static(kind));
    let mut incoming = foreign.chunks(&mut headers, &about)?;
    let mut out = Vec::new();
    for piece in pieces {
        out.extend_from_slice(&incoming.feed(piece).ok()?);
    }
    out.extend_from_slice(&incoming.end());
    Some(out)
}

/// Everything that a stream means to anybody.
#[derive(Debug, PartialEq)]
struct Meaning {
    events: Option<Vec<Vec<u8>>>,
    meters: [Option<String>; 3],
    translations: [Option<Vec<u8>>; 2],
    passed: Option<Vec<String>>,
    chunks: [Option<Vec<u8>>; 2],
}

fn meaning(pieces: &[&[u8]]) -> Meaning {
    let wires = [Wire::Chunks, Wire::Responses, Wire::Messages];
    let ways = [Way::ChatOverMessages, Way::MessagesOverChat];
    Meaning {
        events: decoded(pieces),
        meters: wires.map(|wire| metered(wire, pieces)),
        translations: ways.map(|way| translated(way, pieces)),
        passed: passed(pieces),
        chunks: [Foreign::Gemini, Foreign::Bedrock].map(|foreign| chunks_of(foreign, pieces)),
    }
}

#[test]
fn a_stream_means_the_same_at_every_split_point() {
    for (name, bytes) in corpus("sse") {
        let whole = meaning(&[&bytes]);
        assert!(whole.events.is_some() && whole.passed.is_some(), "{name}");
        for at in 0..=bytes.len() {
            let (before, after) = bytes.split_at(at);
            assert_eq!(meaning(&[before, after]), whole, "{name} at {at}");
        }
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(meaning(&single), whole, "{name}");
    }
}

/// Whatever a body is, its readers agree on it.
fn read_by_all(body: &[u8]) {
    if let Some(form) = canonical(body) {
        assert_eq!(canonical(&form).as_ref(), Some(&form));
    }
    for way in [Way::ChatOverMessages, Way::MessagesOverChat] {
        if let (Ok(_), Ok(sent)) = (Call::parse(body), way.request(body, Rest::Drop)) {
            let call = Call::parse(&sent.body).unwrap();
            assert_eq!(Some(call.model_at), sent.model_at);
        }
        let _ = way.answer(body, 7);
    }
    for foreign in [Foreign::Gemini, Foreign::Bedrock] {
        let _ = foreign.request(body, Rest::Drop);
    }
    if let Ok(call) = Call::parse(body) {
        assert!(call.model_at.end <= body.len());
        let model: serde_json::Value = serde_json::from_slice(&body[call.model_at]).unwrap();
        assert_eq!(model.as_str(), Some(&*call.model));
    }
    let _ = multipart::read(body, "x");
}

#[test]
fn every_body_is_read_or_refused_by_every_reader() {
    for (name, body) in corpus("body") {
        println!("{name}");
        read_by_all(&body);
    }
}

static STREAMS: LazyLock<Vec<(String, Vec<u8>)>> = LazyLock::new(|| corpus("sse"));
static BODIES: LazyLock<Vec<(String, Vec<u8>)>> = LazyLock::new(|| corpus("body"));

/// Line ends of all kinds, halves of characters, and what means something to one reader or another.
const PIECES: [&[u8]; 24] = [
    b"\r",
    b"\n",
    b"\r\n",
    b"\n\n",
    b"\r\r",
    b"data:",
    b"data: ",
    b": ",
    b"event: error\n",
    b"id: 1\n",
    b"[DONE]",
    b"\xff",
    b"\xc3",
    b"\xe2\x82",
    b"\xef\xbb\xbf",
    b"\0",
    b"{",
    b"}",
    b"\"",
    b"\\ud800",
    b"null",
    b"1e999",
    b"\"error\":{},",
    b"\"model\":\"x\",",
];

/// A mistake at a place, as a part of the whole.
#[derive(Clone, Debug)]
enum Mistake {
    Insert(f64, usize),
    Replace(f64, u8),
    Remove(f64, usize),
    Repeat(f64, usize),
    /// What follows is that of another one.
    Cross(f64, prop::sample::Index),
}

fn mistake() -> impl Strategy<Value = Mistake> {
    let place = || 0.0..=1.0_f64;
    prop_oneof![
        (place(), 0..PIECES.len()).prop_map(|(at, piece)| Mistake::Insert(at, piece)),
        (place(), any::<u8>()).prop_map(|(at, byte)| Mistake::Replace(at, byte)),
        (place(), 1..40_usize).prop_map(|(at, count)| Mistake::Remove(at, count)),
        (place(), 1..400_usize).prop_map(|(at, count)| Mistake::Repeat(at, count)),
        (place(), any::<prop::sample::Index>()).prop_map(|(at, other)| Mistake::Cross(at, other)),
    ]
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a place in a short text"
)]
fn make(mistake: &Mistake, bytes: &mut Vec<u8>, others: &[(String, Vec<u8>)]) {
    let place = |at: f64, bytes: &[u8]| (at * bytes.len() as f64) as usize;
    match mistake {
        Mistake::Insert(at, piece) => {
            let at = place(*at, bytes);
            bytes.splice(at..at, PIECES[*piece].iter().copied());
        }
        Mistake::Replace(at, byte) => {
            let at = place(*at, bytes);
            if let Some(there) = bytes.get_mut(at) {
                *there = *byte;
            }
        }
        Mistake::Remove(at, count) => {
            let at = place(*at, bytes);
            bytes.drain(at..bytes.len().min(at + count));
        }
        Mistake::Repeat(at, count) => {
            let at = place(*at, bytes);
            let again = bytes[at..bytes.len().min(at + count)].to_vec();
            bytes.splice(at..at, again);
        }
        Mistake::Cross(at, other) => {
            let (_, other) = other.get(others);
            bytes.truncate(place(*at, bytes));
            bytes.extend_from_slice(&other[place(*at, other)..]);
        }
    }
}

fn mistaken(all: &'static [(String, Vec<u8>)]) -> impl Strategy<Value = Vec<u8>> {
    let mistakes = prop::collection::vec(mistake(), 1..8);
    (prop::sample::select(all), mistakes).prop_map(move |((_, mut bytes), mistakes)| {
        for mistake in &mistakes {
            make(mistake, &mut bytes, all);
        }
        bytes
    })
}

proptest! {
    #[test]
    fn a_stream_with_mistakes_means_the_same_wherever_it_is_split(
        bytes in mistaken(&STREAMS),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 1..12),
    ) {
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let pieces: Vec<&[u8]> = cuts.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
        let (split, whole) = (meaning(&pieces), meaning(&[&bytes]));
        prop_assert_eq!(split, whole, "{}", bytes.escape_ascii());
    }

    #[test]
    fn a_body_with_mistakes_is_read_or_refused_by_every_reader(body in mistaken(&BODIES)) {
        read_by_all(&body);
    }
}
