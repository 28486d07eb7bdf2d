//! How deep a JSON text is nested. Pure.

/// Deeper bodies are refused: parsers of backends recurse, and schemas of tools stay below 30 levels. serde_json's own
/// limit.
pub const MAX_DEPTH: usize = 128;

/// Whether arrays and objects are nested deeper than [`MAX_DEPTH`]. Most bodies do not open as many at all.
pub(crate) fn is_too_deep(body: &[u8]) -> bool {
    if memchr::memchr2_iter(b'[', b'{', body)
        .take(MAX_DEPTH + 1)
        .count()
        <= MAX_DEPTH
    {
        return false;
    }
    let (mut depth, mut in_text, mut escaped) = (0_usize, false, false);
    for byte in body {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            b'[' | b'{' if !in_text => {
                depth += 1;
                if depth > MAX_DEPTH {
                    return true;
                }
            }
            b']' | b'}' if !in_text => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    false
}
