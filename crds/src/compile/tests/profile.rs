//! What a backend says of itself.

use super::*;

#[test]
fn a_price_may_be_that_of_the_catalogue() {
    let compiled = |price: &str| {
        let spec = format!("{{external: {{url: 'https://x/v1'}}, price: {price}}}");
        let text = backend("chat", &spec) + &policy("p", &rule("r", "chat", "chat"));
        compile(&objects(&text), &Facts::default())
    };
    let known = compiled("{catalogue: openai/gpt-5-mini}");
    assert_eq!(messages(&known), [] as [&str; 0]);
    let price = only(&known).backends[&Id::new("default", "chat")]
        .profile
        .price;
    assert_eq!(price.unwrap().input, 250_000);
    let unknown = compiled("{catalogue: gpt-5-mini}");
    let problem = &unknown.problems[0];
    assert_eq!(problem.path, "spec.price.catalogue");
    assert!(
        problem.message.contains("openai/gpt-5-mini"),
        "{}",
        problem.message
    );
    for wrong in [
        "{}",
        "{catalogue: openai/gpt-5-mini, perMillionTokens: {inputMicroUsd: 1}}",
    ] {
        assert_eq!(compiled(wrong).problems[0].path, "spec.price", "{wrong}");
    }
}

#[test]
fn what_a_backend_says_of_itself_is_compiled_and_checked() {
    let spec = "{pool: {model: m}, capabilities: {contextTokens: 8192, vision: false, tools: true}, \
                price: {perMillionTokens: {inputMicroUsd: 2500000, outputMicroUsd: 10000000}}}";
    let text = backend("chat", spec) + &policy("p", &rule("r", "chat", "chat"));
    let compiled = compile(&objects(&text), &Facts::default());
    assert_eq!(messages(&compiled), [] as [&str; 0]);
    let profile = &only(&compiled).backends[&Id::new("default", "chat")].profile;
    assert_eq!(profile.capabilities.context_tokens, Some(8192));
    assert_eq!(profile.capabilities.lacks, [Need::Vision].into());
    let price = profile.price.unwrap();
    assert_eq!(
        (price.input, price.cached_input, price.output),
        (2_500_000, 2_500_000, 10_000_000)
    );
    let wrong = "{pool: {model: m}, capabilities: {contextTokens: 0}, price: {perMillionTokens: {inputMicroUsd: -1}}}";
    let compiled = compile(&objects(&backend("chat", wrong)), &Facts::default());
    assert_eq!(
        messages(&compiled),
        [
            "LLMBackend/default/chat spec.capabilities.contextTokens InvalidValue",
            "LLMBackend/default/chat spec.price.perMillionTokens.cachedInputMicroUsd InvalidValue",
            "LLMBackend/default/chat spec.price.perMillionTokens.inputMicroUsd InvalidValue",
        ]
    );
}

#[test]
fn pools_count_tokens_and_others_where_they_say_so() {
    for (spec, expected) in [
        ("{pool: {model: m}}", true),
        (
            "{pool: {model: m, engine: Simulated}, capabilities: {vision: true}}",
            true,
        ),
        ("{pool: {model: m}, capabilities: {tokenize: false}}", false),
        ("{external: {url: 'https://a/v1'}}", false),
        (
            "{external: {url: 'https://a/v1'}, capabilities: {tokenize: true}}",
            true,
        ),
    ] {
        let text = backend("chat", spec) + &policy("p", &rule("r", "chat", "chat"));
        let compiled = compile(&objects(&text), &Facts::default());
        assert_eq!(messages(&compiled), [] as [&str; 0], "{spec}");
        let profile = &only(&compiled).backends[&Id::new("default", "chat")].profile;
        assert_eq!(profile.capabilities.tokenize, expected, "{spec}");
    }
}
