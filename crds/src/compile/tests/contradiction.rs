//! Matches that never hold.

use super::*;

#[test]
fn a_match_that_contradicts_itself_is_named() {
    let of_models = |matches: &str| matching("a", matches);
    let of_services = |path: &str| {
        format!("{{name: a, match: {{paths: ['{path}']}}, backends: [{{name: tool}}]}}")
    };
    let list = "/v1/chat/completions, /v1/completions";
    for (rule, path, says) in [
        (of_models("paths: [/v1/chat/completion]"), "paths[0]", list),
        (
            of_models("paths: [/v1/embeddings, '/chat/*']"),
            "paths[1]",
            list,
        ),
        (of_models("paths: [/v1/audio/]"), "paths[0]", list),
        (
            of_models("paths: [/v1/embeddings], needs: [Vision, Tools]"),
            "needs",
            list,
        ),
        (
            of_models("paths: ['/v1/messages/*'], contextTokens: {min: 9}"),
            "contextTokens",
            list,
        ),
        (
            of_models("promptTokens: {min: 10}, contextTokens: {max: 9}"),
            "contextTokens",
            "a prompt of 10 or more",
        ),
        (
            of_models("needs: [Audio], contextTokens: {min: 10}"),
            "contextTokens",
            "pictures and sound",
        ),
        (
            of_models("paths: [/v1/audio/transcriptions], needs: [Audio]"),
            "needs",
            list,
        ),
        (
            of_models("paths: [/v1/images/edits], text: cat"),
            "text",
            list,
        ),
        (
            of_models("paths: [/v1/images/variations], promptTokens: {min: 1}"),
            "promptTokens",
            list,
        ),
        (of_services("/v1/responses"), "paths[0]", "match.models"),
        (of_services("/v1/models/*"), "paths[0]", "match.models"),
        (of_services("/v1/files"), "paths[0]", "match.models"),
    ] {
        let text = backend("chat", POOL) + &backend("tool", TOOL) + &policy("p", &rule);
        let compiled = compile(&objects(&text), &Facts::default());
        let expected =
            format!("RoutingPolicy/default/p spec.rules[0].match.{path} UnreachableRule");
        assert_eq!(messages(&compiled), [expected], "{rule}");
        let message = &compiled.problems[0].message;
        assert!(message.contains(says), "{message}");
    }
}

#[test]
fn a_match_that_holds_of_some_call_is_no_contradiction() {
    for matches in [
        "paths: ['/*']",
        "paths: ['/v1/aud*', /v1/images/inpaint]",
        "paths: [/v1/embeddings], needs: [Vision]",
        "paths: [/v1/embeddings, /v1/responses], needs: [Tools], contextTokens: {min: 9}",
        "promptTokens: {min: 9}, contextTokens: {max: 9}",
        "paths: [/v1/images/edits], promptTokens: {max: 9}",
    ] {
        let compiled = compile_rules(&[matching("a", matches)]);
        assert_eq!(messages(&compiled), [] as [&str; 0], "{matches}");
    }
    for path in ["/v1/*", "/v1/models*", "/v1/files/*", "/v1/audio/voices"] {
        let rule = format!("{{name: a, match: {{paths: ['{path}']}}, backends: [{{name: tool}}]}}");
        let text = backend("tool", TOOL) + &policy("p", &rule);
        let compiled = compile(&objects(&text), &Facts::default());
        assert_eq!(messages(&compiled), [] as [&str; 0], "{path}");
    }
}
