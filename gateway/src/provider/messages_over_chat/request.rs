//! From the body of a message to that of a chat completion.

use std::borrow::Cow;

use serde_json::value::RawValue;

use crate::provider::chat::{
    Content, File, Function, FunctionCall, ImageUrl, JsonSchema, Message, Named, Part, Request,
    ResponseFormat, StreamOptions, Tool, ToolCall, ToolChoice,
};
use crate::provider::fields::Fields;
use crate::provider::messages::{
    BlockIn, MessageIn, MetadataIn, OutputConfigIn, SourceIn, ThinkingIn, ToolChoiceIn, ToolIn,
};
use crate::provider::{Misfit, Rest, Translated, is_null, read, with_model};

const MESSAGES: &str = "a list of messages";

/// See [`super`].
pub(in crate::provider) fn request(body: &[u8], rest: Rest) -> Result<Translated, Misfit> {
    let fields = Fields::of(body)?;
    let (model, request) = Draft::of(&fields, rest, Takes::All)?.finish()?;
    with_model(&model, &request, true)
}

/// What a conversation may hold.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Takes {
    /// Pictures and files too.
    All,
    /// Text only.
    Text,
}

pub(super) struct Draft<'a> {
    rest: Rest,
    takes: Takes,
    model: Cow<'a, str>,
    system: Vec<Part<'a>>,
    request: Request<'a>,
}

impl<'a> Draft<'a> {
    /// Of the members of a message.
    pub(super) fn of(fields: &Fields<'a>, rest: Rest, takes: Takes) -> Result<Self, Misfit> {
        let mut draft = Self {
            rest,
            takes,
            model: Cow::Borrowed(""),
            system: Vec::new(),
            request: Request::default(),
        };
        for (name, raw) in fields.0.iter().filter(|(_, raw)| !is_null(raw)) {
            draft.member(name, raw)?;
        }
        Ok(draft)
    }

    /// The table of members, as docs/protocols.md has it.
    fn member(&mut self, name: &str, raw: &'a RawValue) -> Result<(), Misfit> {
        let request = &mut self.request;
        match name {
            "model" => self.model = read(name, raw, "a text")?,
            "messages" => self.messages(raw)?,
            "system" => self.system = self.texts("system", raw)?,
            "max_tokens" => {
                request.max_completion_tokens = Some(read(name, raw, "a whole number")?);
            }
            "temperature" => request.temperature = Some(raw),
            "top_p" => request.top_p = Some(raw),
            "top_k" => request.top_k = Some(raw),
            "stop_sequences" => request.stop = Some(raw),
            "stream" => {
                let stream = read(name, raw, "true or false")?;
                request.stream = Some(stream);
                request.stream_options = stream.then_some(StreamOptions {
                    include_usage: true,
                });
            }
            "tools" => self.tools(raw)?,
            "tool_choice" => self.tool_choice(raw)?,
            "thinking" => {
                let thinking: ThinkingIn<'_> = read(name, raw, "an object with a type")?;
                request.reasoning_effort = request.reasoning_effort.or(effort_of(&thinking));
            }
            "output_config" => self.output_config(raw)?,
            "metadata" => {
                let metadata: MetadataIn<'a> = read(name, raw, "an object")?;
                request.user = metadata.user_id;
            }
            "service_tier" => match read::<Cow<'_, str>>(name, raw, "a text")?.as_ref() {
                "auto" => request.service_tier = Some("auto"),
                "standard_only" => request.service_tier = Some("default"),
                _ => self.rest.leave(name)?,
            },
            // Hints: engines cache prefixes by themselves.
            "cache_control" => {}
            _ => self.rest.leave(name)?,
        }
        Ok(())
    }

    /// A text, or blocks of text.
    fn texts(&self, at: &str, raw: &'a RawValue) -> Result<Vec<Part<'a>>, Misfit> {
        let mut texts = Vec::new();
        for (index, block) in blocks(at, raw)?.into_iter().enumerate() {
            match (block.kind.as_ref(), block.text) {
                ("text", Some(text)) => texts.push(Part::Text { text }),
                _ => self.rest.leave(format!("{at}[{index}].type"))?,
            }
        }
        Ok(texts)
    }

    fn messages(&mut self, raw: &'a RawValue) -> Result<(), Misfit> {
        let messages: Vec<MessageIn<'a>> = read("messages", raw, MESSAGES)?;
        for (index, message) in messages.into_iter().enumerate() {
            let at = format!("messages[{index}].content");
            match message.role.as_ref() {
                "user" => self.user(&at, message.content)?,
                "assistant" => self.assistant(&at, message.content)?,
                "system" => {
                    let content = Content::of(self.texts(&at, message.content)?);
                    self.request.messages.push(Message::System { content });
                }
                _ => {
                    return Err(Misfit::Invalid(
                        format!("messages[{index}].role"),
                        "user or assistant",
                    ));
                }
            }
        }
        Ok(())
    }

    fn user(&mut self, at: &str, raw: &'a RawValue) -> Result<(), Misfit> {
        let mut parts = Vec::new();
        for (index, block) in blocks(at, raw)?.into_iter().enumerate() {
            let at = format!("{at}[{index}]");
            if block.kind == "tool_result" {
                self.tool_result(&at, block, &mut parts)?;
            } else {
                self.part(&at, block, &mut parts)?;
            }
        }
        if !parts.is_empty() {
            let content = Content::of(parts);
            self.request.messages.push(Message::User { content });
        }
        Ok(())
    }

    /// A tool's message holds text only: its pictures and documents go into the user's message that follows it.
    fn tool_result(
        &mut self,
        at: &str,
        block: BlockIn<'a>,
        after: &mut Vec<Part<'a>>,
    ) -> Result<(), Misfit> {
        let tool_call_id = block.tool_use_id.ok_or_else(|| {
            Misfit::Invalid(format!("{at}.tool_use_id"), "the id of a use of a tool")
        })?;
        let mut texts = Vec::new();
        let inner = block.content.map(|raw| blocks(at, raw)).transpose()?;
        for (index, block) in inner.into_iter().flatten().enumerate() {
            let mut parts = Vec::new();
            self.part(&format!("{at}.content[{index}]"), block, &mut parts)?;
            for part in parts {
                match part {
                    Part::Text { .. } => texts.push(part),
                    other => after.push(other),
                }
            }
        }
        // Chat completions have no mark for it; the word is what models know.
        if block.is_error == Some(true) {
            let text = Cow::Borrowed("Error:");
            texts.insert(0, Part::Text { text });
        }
        self.request.messages.push(Message::Tool {
            tool_call_id,
            content: Content::of(texts),
        });
        Ok(())
    }

    fn part(&self, at: &str, block: BlockIn<'a>, parts: &mut Vec<Part<'a>>) -> Result<(), Misfit> {
        let has_citations = block
            .citations
            .is_some_and(|raw| raw.get().contains("\"enabled\"") && raw.get().contains("true"));
        let is_text = match (block.kind.as_ref(), &block.source) {
            ("image", _) => false,
            ("document", Some(source)) => source.kind == "text",
            _ => true,
        };
        if self.takes == Takes::Text && !is_text {
            return self.rest.leave(format!("{at}.type"));
        }
        match (block.kind.as_ref(), block.text, block.source) {
            ("text", Some(text), _) => parts.push(Part::Text { text }),
            ("image", _, Some(source)) => match url(source) {
                Some(url) => parts.push(Part::ImageUrl {
                    image_url: ImageUrl { url },
                }),
                None => self.rest.leave(format!("{at}.source"))?,
            },
            ("document", _, Some(_)) if has_citations => {
                self.rest.leave(format!("{at}.citations"))?;
            }
            ("document", _, Some(source)) => match document(source, block.title) {
                Some(part) => parts.push(part),
                None => self.rest.leave(format!("{at}.source"))?,
            },
            _ => self.rest.leave(format!("{at}.type"))?,
        }
        Ok(())
    }

    fn assistant(&mut self, at: &str, raw: &'a RawValue) -> Result<(), Misfit> {
        let mut texts = Vec::new();
        let mut tool_calls = Vec::new();
        for (index, block) in blocks(at, raw)?.into_iter().enumerate() {
            match (block.kind.as_ref(), block.text) {
                ("text", Some(text)) => texts.push(Part::Text { text }),
                ("tool_use", _) => {
                    let missing =
                        || Misfit::Invalid(format!("{at}[{index}]"), "a tool_use with id and name");
                    tool_calls.push(ToolCall {
                        index: None,
                        id: Some(block.id.ok_or_else(missing)?),
                        kind: Some("function"),
                        function: FunctionCall {
                            name: Some(block.name.ok_or_else(missing)?),
                            arguments: Cow::Borrowed(block.input.map_or("{}", RawValue::get)),
                        },
                        extra_content: None,
                    });
                }
                // Signed by the model that thought it: no other can use it.
                ("thinking" | "redacted_thinking", _) => {}
                _ => self.rest.leave(format!("{at}[{index}].type"))?,
            }
        }
        let content = (!texts.is_empty()).then(|| Content::of(texts));
        if content.is_some() || !tool_calls.is_empty() {
            self.request.messages.push(Message::Assistant {
                content,
                tool_calls,
            });
        }
        Ok(())
    }

    fn tools(&mut self, raw: &'a RawValue) -> Result<(), Misfit> {
        let tools: Vec<ToolIn<'a>> = read("tools", raw, "a list of tools")?;
        let mut wanted = Vec::with_capacity(tools.len());
        for (index, tool) in tools.into_iter().enumerate() {
            if tool.kind.is_some_and(|kind| kind != "custom") {
                // Tools that Anthropic runs or defines.
                self.rest.leave(format!("tools[{index}].type"))?;
                continue;
            }
            wanted.push(Tool {
                kind: "function",
                function: Function {
                    name: tool.name,
                    description: tool.description,
                    parameters: tool.input_schema,
                    strict: tool.strict,
                },
            });
        }
        self.request.tools = (!wanted.is_empty()).then_some(wanted);
        Ok(())
    }

    fn tool_choice(&mut self, raw: &'a RawValue) -> Result<(), Misfit> {
        const EXPECTED: &str = "an object whose type is auto, any, tool or none";
        let choice: ToolChoiceIn<'a> = read("tool_choice", raw, EXPECTED)?;
        let invalid = || Misfit::Invalid("tool_choice".to_owned(), EXPECTED);
        self.request.tool_choice = Some(match choice.kind.as_ref() {
            "auto" => ToolChoice::Mode("auto"),
            "any" => ToolChoice::Mode("required"),
            "none" => ToolChoice::Mode("none"),
            "tool" => ToolChoice::Named {
                kind: "function",
                function: Named {
                    name: choice.name.ok_or_else(invalid)?,
                },
            },
            _ => return Err(invalid()),
        });
        if choice.disable_parallel_tool_use == Some(true) {
            self.request.parallel_tool_calls = Some(false);
        }
        Ok(())
    }

    fn output_config(&mut self, raw: &'a RawValue) -> Result<(), Misfit> {
        let config: OutputConfigIn<'a> = read("output_config", raw, "an object")?;
        if let Some(effort) = config.effort {
            self.request.reasoning_effort = Some(match effort.as_ref() {
                "low" => "low",
                "medium" => "medium",
                // `xhigh` and `max` are known to few models.
                _ => "high",
            });
        }
        match config.format {
            Some(format) if format.kind == "json_schema" && format.schema.is_some() => {
                self.request.response_format = format.schema.map(|schema| ResponseFormat {
                    kind: "json_schema",
                    json_schema: JsonSchema {
                        name: "answer",
                        schema,
                        strict: true,
                    },
                });
            }
            Some(_) => self.rest.leave("output_config.format")?,
            None => {}
        }
        Ok(())
    }

    /// The model, and all else.
    pub(super) fn finish(mut self) -> Result<(Cow<'a, str>, Request<'a>), Misfit> {
        if self.request.messages.is_empty() {
            return Err(Misfit::Invalid("messages".to_owned(), MESSAGES));
        }
        if !self.system.is_empty() {
            let content = Content::of(self.system);
            self.request.messages.insert(0, Message::System { content });
        }
        if self.request.tools.is_none() {
            // Refused by backends where there is no tool to choose.
            self.request.tool_choice = None;
            self.request.parallel_tool_calls = None;
        }
        Ok((self.model, self.request))
    }
}

/// Content is a text or a list of blocks.
fn blocks<'a>(at: &str, raw: &'a RawValue) -> Result<Vec<BlockIn<'a>>, Misfit> {
    const EXPECTED: &str = "a text or a list of blocks";
    if !raw.get().starts_with('"') {
        return read(at, raw, EXPECTED);
    }
    let text: Cow<'a, str> = read(at, raw, EXPECTED)?;
    Ok(vec![BlockIn::text(text)])
}

fn url(source: SourceIn<'_>) -> Option<Cow<'_, str>> {
    match (source.kind.as_ref(), source.media_type, source.data) {
        ("base64", Some(media_type), Some(data)) => {
            Some(Cow::Owned(format!("data:{media_type};base64,{data}")))
        }
        ("url", ..) => source.url,
        _ => None,
    }
}

fn document<'a>(source: SourceIn<'a>, title: Option<Cow<'a, str>>) -> Option<Part<'a>> {
    match (source.kind.as_ref(), source.media_type, source.data) {
        ("base64", Some(media_type), Some(data)) => Some(Part::File {
            file: File {
                filename: title.unwrap_or(Cow::Borrowed("document.pdf")),
                file_data: format!("data:{media_type};base64,{data}"),
            },
        }),
        ("text", _, Some(text)) => Some(Part::Text { text }),
        _ => None,
    }
}

/// A budget of thoughts as one of the levels of chat completions.
fn effort_of(thinking: &ThinkingIn<'_>) -> Option<&'static str> {
    match (thinking.kind.as_ref(), thinking.budget_tokens) {
        ("enabled", Some(..=2048)) => Some("low"),
        ("enabled", Some(..=8192)) => Some("medium"),
        ("enabled", _) => Some("high"),
        // `adaptive`: the model decides, as it does where nothing is said.
        _ => None,
    }
}
