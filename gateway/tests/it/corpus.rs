//! Everything odd that was ever met, in `gateway/corpus`: streams at every split point, bodies through every reader. A
//! case that fails once is added there.

use bytes::Bytes;
use std::fs;
use std::path::Path;

use penstock_gateway::cache::canonical::canonical;
use penstock_gateway::events::{Care, Events};
use penstock_gateway::meter::Meter;
use penstock_gateway::multipart;
use penstock_gateway::openai::{Call, Wire};
use penstock_gateway::provider::{Rest, Way};
use penstock_gateway::sse::Decoder;

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

fn decoded(pieces: &[&[u8]]) -> Vec<Vec<u8>> {
    let mut decoder = Decoder::default();
    let mut events = Vec::new();
    for piece in pieces {
        let fed = decoder.feed(piece, |data, _| events.push(data.to_vec()));
        fed.unwrap();
    }
    events
}

/// What a meter says at the end, as text.
fn metered(wire: Wire, pieces: &[&[u8]]) -> String {
    let mut meter = Meter::new(wire);
    let tokens: u32 = pieces
        .iter()
        .map(|piece| meter.feed(piece).unwrap().tokens)
        .sum();
    let (done, started) = (meter.is_done(), meter.has_started());
    let (cut, usage) = (meter.cut(), meter.usage());
    format!("{tokens} {done} {started} {cut:?} {usage:?}")
}

/// What goes on to a caller who wants texts only, up to the end, by lines: half a line end may be its last byte.
fn passed(pieces: &[&[u8]]) -> Vec<String> {
    let care = Care {
        wants_count: false,
        stands_gaps: true,
    };
    let mut events = Events::new(Wire::Chunks, care);
    let mut out = Vec::new();
    for piece in pieces {
        let passed = events.feed(Bytes::copy_from_slice(piece)).unwrap();
        out.extend_from_slice(&passed.bytes);
        if passed.ends {
            break;
        }
    }
    let out = String::from_utf8_lossy(&out).replace("\r\n", "\n");
    out.split(['\n', '\r']).map(str::to_owned).collect()
}

fn translated(way: Way, pieces: &[&[u8]]) -> Vec<u8> {
    let mut translator = way.stream(7, true).unwrap();
    let mut out = Vec::new();
    for piece in pieces {
        out.extend_from_slice(&translator.feed(piece).unwrap());
    }
    out
}

#[test]
fn a_stream_means_the_same_at_every_split_point() {
    for (name, bytes) in corpus("sse") {
        let whole = [bytes.as_slice()];
        let events = decoded(&whole);
        let wires = [Wire::Chunks, Wire::Responses, Wire::Messages];
        let ways = [Way::ChatOverMessages, Way::MessagesOverChat];
        let meters = wires.map(|wire| metered(wire, &whole));
        let translations = ways.map(|way| translated(way, &whole));
        let passes = passed(&whole);
        for at in 0..=bytes.len() {
            let (before, after) = bytes.split_at(at);
            let pieces = [before, after];
            assert_eq!(decoded(&pieces), events, "{name} at {at}");
            assert_eq!(passed(&pieces), passes, "{name} at {at}");
            assert_eq!(
                wires.map(|wire| metered(wire, &pieces)),
                meters,
                "{name} at {at}"
            );
            assert_eq!(
                ways.map(|way| translated(way, &pieces)),
                translations,
                "{name} at {at}"
            );
        }
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(decoded(&single), events, "{name}");
        assert_eq!(passed(&single), passes, "{name}");
    }
}

#[test]
fn every_body_is_read_or_refused_by_every_reader() {
    for (name, body) in corpus("body") {
        if let Some(form) = canonical(&body) {
            assert_eq!(canonical(&form), Some(form.clone()), "{name}");
        }
        for way in [Way::ChatOverMessages, Way::MessagesOverChat] {
            if let Ok(sent) = way.request(&body, Rest::Drop) {
                let call = Call::parse(&sent.body).unwrap();
                assert_eq!(Some(call.model_at), sent.model_at, "{name}");
            }
            let _ = way.answer(&body, 7);
        }
        if let Ok(call) = Call::parse(&body) {
            assert!(call.model_at.end <= body.len(), "{name}");
        }
        let _ = multipart::read(&body, "x");
    }
}
