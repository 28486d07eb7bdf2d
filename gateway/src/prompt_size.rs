//! About how many tokens a prompt has, by its bytes. Pure.
//!
//! A token of text has about 4 bytes. Pictures, sound and files stand in JSON as base64, whose length says little of
//! their tokens: each of them counts as a picture.

use memchr::memmem;

use crate::load::BYTES_PER_TOKEN;

/// Tokens of a picture: one of 1024 × 1024 in high detail has 85 + 4 × 170 at OpenAI; others count some 250 to 1,600.
pub(crate) const TOKENS_OF_A_MEDIUM: u32 = 765;
/// Prompts are looked at here and there: what is shorter than this may be taken for text.
const STEP: usize = 1024;
/// So many bytes in a row, which words and JSON do not have without a space, a quote or a comma.
const SAMPLE: usize = 64;
/// A data URL says within so many bytes what it is.
const MAX_MEDIA_TYPE: usize = 256;
/// Members that hold base64 which does not say so: sound and files of callers, pictures that a model made.
const MEMBERS: [&[u8]; 3] = [b"\"data\"", b"\"result\"", b"\"b64_json\""];

/// About how many tokens these JSON texts have together.
pub(crate) fn tokens<'a>(texts: impl IntoIterator<Item = &'a [u8]>) -> u32 {
    let (mut bytes, mut media) = (0, 0_u32);
    for json in texts {
        let (of_text, inside) = split(json);
        bytes += of_text;
        media = media.saturating_add(inside);
    }
    let text = u32::try_from(bytes).unwrap_or(u32::MAX) / BYTES_PER_TOKEN;
    text.saturating_add(media.saturating_mul(TOKENS_OF_A_MEDIUM))
}

/// Bytes of text, and how many media there are.
fn split(json: &[u8]) -> (usize, u32) {
    let (mut bytes, mut media) = (json.len(), 0);
    let mut at = STEP;
    while let Some(sample) = json.get(at..at + SAMPLE) {
        if sample.iter().all(|byte| is_base64(*byte)) {
            let from = memchr::memrchr(b'"', &json[..at]).map_or(0, |quote| quote + 1);
            let length = memchr::memchr(b'"', &json[at..]).unwrap_or(json.len() - at);
            let to = at + length;
            if is_medium(&json[..from], &json[from..to]) {
                bytes -= to - from;
                media += 1;
            }
            // No string is looked at twice.
            at = to;
        }
        at += STEP;
    }
    (bytes, media)
}

/// Some writers escape slashes.
fn is_base64(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'-' | b'_' | b'=' | b'\\')
}

/// Whether a string is said to be base64, by itself or by the name of its member, which `before` ends with.
fn is_medium(before: &[u8], string: &[u8]) -> bool {
    if string.starts_with(b"data:") {
        let head = &string[..string.len().min(MAX_MEDIA_TYPE)];
        return memmem::find(head, b";base64,").is_some();
    }
    let name = before
        .strip_suffix(b"\"")
        .unwrap_or(before)
        .trim_ascii_end();
    let name = name.strip_suffix(b":").unwrap_or_default();
    let name = name.trim_ascii_end();
    MEMBERS.iter().any(|member| name.ends_with(member))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(json: &str) -> u32 {
        tokens([json.as_bytes()])
    }

    #[test]
    fn text_has_four_bytes_to_a_token() {
        assert_eq!(of(&"word ".repeat(8_000)), 10_000);
        let words = "Donaudampfschifffahrtsgesellschaft, ".repeat(1_000);
        assert_eq!(of(&words), 9_000);
        assert_eq!(of(""), 0);
        let all: [&[u8]; 3] = [b"aaa", b"b", b"cccc"];
        assert_eq!(tokens(all), 2);
    }

    #[test]
    fn each_medium_counts_as_a_picture_however_large() {
        let data = "iVBORw0KGgo/+A==".repeat(10_000);
        let escaped = data.replace('/', r"\/");
        for medium in [
            format!(
                r#"{{"type":"image_url","image_url":{{"url":"data:image/png;base64,{data}"}}}}"#
            ),
            format!(
                r#"{{"type":"image_url","image_url":{{"url":"data:image/png;base64,{escaped}"}}}}"#
            ),
            format!(r#"{{"type":"input_image","image_url":"data:image/png;base64,{data}"}}"#),
            format!(
                r#"{{"type":"image","source":{{"type":"base64","media_type":"image/png","data":"{data}"}}}}"#
            ),
            format!(
                r#"{{"type":"input_audio","input_audio":{{"data" : "{data}","format":"wav"}}}}"#
            ),
            format!(
                r#"{{"type":"file","file":{{"file_data":"data:application/pdf;base64,{data}"}}}}"#
            ),
            format!(r#"{{"type":"image_generation_call","result":"{data}"}}"#),
        ] {
            let text = "what is this? ".repeat(100);
            let one = format!(
                r#"[{{"role":"user","content":[{{"type":"text","text":"{text}"}},{medium}]}}]"#
            );
            let found = of(&one);
            assert!(
                (1_115..1_175).contains(&found),
                "{found}: {}",
                &medium[..60]
            );
            let two = format!(r#"[{{"role":"user","content":[{medium},{medium}]}}]"#);
            assert!((1_530..1_620).contains(&of(&two)), "{}", &medium[..60]);
        }
    }

    #[test]
    fn what_only_looks_like_base64_is_text() {
        let hexadecimal = "0123456789abcdef".repeat(1_000);
        for text in [
            format!(r#"{{"text":"{hexadecimal}"}}"#),
            format!(r#"{{"text":"{}"}}"#, r"\u4e2d\u6587".repeat(1_000)),
            hexadecimal,
        ] {
            assert_eq!(of(&text), u32::try_from(text.len() / 4).unwrap());
        }
    }

    proptest! {
        #[test]
        fn it_is_never_more_than_all_bytes_and_its_media(bytes in prop::collection::vec(prop::sample::select(b"aA/\"\\,: d".to_vec()), 0..8_192)) {
            let (text, media) = split(&bytes);
            prop_assert!(text <= bytes.len());
            prop_assert!(bytes.len() - text >= usize::try_from(media).unwrap() * SAMPLE);
        }
    }
}
