//! From the body of a chat completion to that of a message.

use std::borrow::Cow;

use serde_json::value::RawValue;

use crate::provider::chat::{MessageIn, PartIn, ToolCallIn, ToolIn};
use crate::provider::fields::Fields;
use crate::provider::messages::{
    Block, Format, Message, Metadata, OutputConfig, Request, Source, Tool, ToolChoice,
};
use crate::provider::reading::{
    self, Choose, Form, MESSAGES, asks_for_nothing, data_url, is_hint, tool_id,
};
use crate::provider::{Misfit, Rest, Translated, is_null, read, with_model};

/// Sent when the caller sets no limit, because Anthropic demands one. Every Claude model since the third generation
/// may answer with as many tokens.
const DEFAULT_MAX_TOKENS: u64 = 4096;

/// See [`super`].
pub(in crate::provider) fn request(body: &[u8], rest: Rest) -> Result<Translated, Misfit> {
    let Fields(fields) = Fields::of(body)?;
    let mut draft = Draft::new(rest);
    for (name, raw) in fields.iter().filter(|(_, raw)| !is_null(raw)) {
        draft.member(name, raw)?;
    }
    draft.finish()
}

struct Draft<'a> {
    rest: Rest,
    model: Cow<'a, str>,
    request: Request<'a>,
    max_tokens: Option<u64>,
    parallel: Option<bool>,
    effort: Option<&'static str>,
    format: Option<Format<'a>>,
    include_usage: bool,
}

impl<'a> Draft<'a> {
    fn new(rest: Rest) -> Self {
        Self {
            rest,
            model: Cow::Borrowed(""),
            request: Request::default(),
            max_tokens: None,
            parallel: None,
            effort: None,
            format: None,
            include_usage: false,
        }
    }

    /// The table of members, as docs/protocols.md has it.
    fn member(&mut self, name: &str, raw: &'a RawValue) -> Result<(), Misfit> {
        match name {
            "model" => self.model = read(name, raw, "a text")?,
            "messages" => self.messages(raw)?,
            "max_completion_tokens" => self.max_tokens = Some(read(name, raw, "a whole number")?),
            "max_tokens" => {
                self.max_tokens = self.max_tokens.or(Some(read(name, raw, "a whole number")?));
            }
            "temperature" => {
                // OpenAI's range ends at 2, Anthropic's at 1; its newer models take none and say so themselves.
                if read::<f64>(name, raw, "a number")? <= 1.0 {
                    self.request.temperature = Some(raw);
                } else {
                    self.rest.leave(name)?;
                }
            }
            "top_p" => self.request.top_p = Some(raw),
            "top_k" => self.request.top_k = Some(raw),
            "stop" => self.request.stop_sequences = Some(reading::stop(raw)?),
            "stream" => self.request.stream = Some(read(name, raw, "true or false")?),
            "stream_options" => self.include_usage = reading::include_usage(raw)?,
            "tools" => self.tools(raw)?,
            "tool_choice" => self.tool_choice(raw)?,
            "parallel_tool_calls" => self.parallel = Some(read(name, raw, "true or false")?),
            "response_format" => self.response_format(raw)?,
            "reasoning_effort" => self.effort = Some(effort(name, raw)?),
            "user" | "safety_identifier" => {
                let user_id = read(name, raw, "a text")?;
                self.request.metadata = Some(Metadata { user_id });
            }
            "service_tier" => match read::<Cow<'_, str>>(name, raw, "a text")?.as_ref() {
                "auto" => self.request.service_tier = Some("auto"),
                "default" => self.request.service_tier = Some("standard_only"),
                _ => self.rest.leave(name)?,
            },
            _ if is_hint(name) || asks_for_nothing(name, raw) => {}
            _ => self.rest.leave(name)?,
        }
        Ok(())
    }

    fn messages(&mut self, raw: &'a RawValue) -> Result<(), Misfit> {
        let messages: Vec<MessageIn<'a>> = read("messages", raw, MESSAGES)?;
        for (index, message) in messages.into_iter().enumerate() {
            let at = format!("messages[{index}]");
            match message.role.as_ref() {
                "system" | "developer" => {
                    let blocks = self.content(&at, message.content)?;
                    self.request.system.extend(blocks);
                }
                "user" => {
                    let blocks = self.content(&at, message.content)?;
                    self.say("user", blocks);
                }
                "assistant" => {
                    let blocks = self.assistant(&at, message)?;
                    self.say("assistant", blocks);
                }
                "tool" => {
                    let content = self.content(&at, message.content)?;
                    let tool_use_id = message.tool_call_id.ok_or_else(|| {
                        Misfit::Invalid(format!("{at}.tool_call_id"), "the id of a tool call")
                    })?;
                    let result = Block::ToolResult {
                        tool_use_id: tool_id(tool_use_id),
                        content,
                    };
                    self.say("user", vec![result]);
                }
                "function" => self.rest.leave(format!("{at}.role"))?,
                _ => {
                    return Err(Misfit::Invalid(
                        format!("{at}.role"),
                        "system, developer, user, assistant or tool",
                    ));
                }
            }
        }
        Ok(())
    }

    /// Anthropic wants a user and an assistant in turn, the results of tools together and first.
    fn say(&mut self, role: &'static str, blocks: Vec<Block<'a>>) {
        match self.request.messages.last_mut() {
            _ if blocks.is_empty() => {}
            Some(last) if last.role == role => last.content.extend(blocks),
            _ => self.request.messages.push(Message {
                role,
                content: blocks,
            }),
        }
    }

    fn content(&self, at: &str, raw: Option<&'a RawValue>) -> Result<Vec<Block<'a>>, Misfit> {
        let mut blocks = Vec::new();
        let Some(raw) = raw else { return Ok(blocks) };
        if raw.get().starts_with('"') {
            let text = read(at, raw, "a text")?;
            blocks.extend(text_block(text));
            return Ok(blocks);
        }
        let at = format!("{at}.content");
        let parts: Vec<PartIn<'a>> = read(&at, raw, "a text or a list of parts")?;
        for (index, part) in parts.into_iter().enumerate() {
            match part.kind.as_ref() {
                "text" => blocks.extend(part.text.and_then(text_block)),
                "refusal" => blocks.extend(part.refusal.and_then(text_block)),
                "image_url" => {
                    let url = part.image_url.map(|image| image.url).unwrap_or_default();
                    let source = source(url).ok_or_else(|| {
                        Misfit::Invalid(format!("{at}[{index}].image_url.url"), "a URL")
                    })?;
                    blocks.push(Block::Image { source });
                }
                "file" => match part.file {
                    Some(file) if file.file_data.is_some() => {
                        let data = file.file_data.unwrap_or_default();
                        let source = source(data).ok_or_else(|| {
                            Misfit::Invalid(
                                format!("{at}[{index}].file.file_data"),
                                "a data: URL in base64",
                            )
                        })?;
                        let title = file.filename;
                        blocks.push(Block::Document { source, title });
                    }
                    _ => self.rest.leave(format!("{at}[{index}].file"))?,
                },
                _ => self.rest.leave(format!("{at}[{index}].type"))?,
            }
        }
        Ok(blocks)
    }

    fn assistant(&self, at: &str, message: MessageIn<'a>) -> Result<Vec<Block<'a>>, Misfit> {
        if message.audio.is_some() {
            self.rest.leave(format!("{at}.audio"))?;
        }
        if message.function_call.is_some() {
            self.rest.leave(format!("{at}.function_call"))?;
        }
        let mut blocks = self.content(at, message.content)?;
        blocks.extend(message.refusal.and_then(text_block));
        for (index, call) in message.tool_calls.into_iter().flatten().enumerate() {
            let at = format!("{at}.tool_calls[{index}]");
            match tool_use(&at, call)? {
                Some(block) => blocks.push(block),
                None => self.rest.leave(at)?,
            }
        }
        Ok(blocks)
    }

    fn tools(&mut self, raw: &'a RawValue) -> Result<(), Misfit> {
        let tools: Vec<ToolIn<'a>> = read("tools", raw, "a list of functions")?;
        let mut wanted = Vec::with_capacity(tools.len());
        for (index, tool) in tools.into_iter().enumerate() {
            let Some(function) = tool.function else {
                self.rest.leave(format!("tools[{index}].type"))?;
                continue;
            };
            wanted.push(Tool {
                name: function.name,
                description: function.description,
                input_schema: match function.parameters {
                    Some(schema) => Cow::Borrowed(schema),
                    None => Cow::Owned(empty_object(r#"{"type":"object"}"#)),
                },
                strict: function.strict,
            });
        }
        self.request.tools = Some(wanted);
        Ok(())
    }

    fn tool_choice(&mut self, raw: &'a RawValue) -> Result<(), Misfit> {
        let choice = |kind| ToolChoice {
            kind,
            name: None,
            disable_parallel_tool_use: None,
        };
        let choice = match reading::tool_choice(raw)? {
            Some(Choose::None) => choice("none"),
            Some(Choose::Auto) => choice("auto"),
            Some(Choose::Any) => choice("any"),
            Some(Choose::Tool(name)) => ToolChoice {
                name: Some(name),
                ..choice("tool")
            },
            None => return self.rest.leave("tool_choice"),
        };
        self.request.tool_choice = Some(choice);
        Ok(())
    }

    fn response_format(&mut self, raw: &'a RawValue) -> Result<(), Misfit> {
        match reading::response_format(raw)? {
            Some(Form::Text) => {}
            Some(Form::Schema(schema)) => {
                self.format = Some(Format {
                    kind: "json_schema",
                    schema,
                });
            }
            Some(Form::Object) | None => self.rest.leave("response_format")?,
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Translated, Misfit> {
        if self.request.messages.is_empty() {
            return Err(Misfit::Invalid("messages".to_owned(), MESSAGES));
        }
        self.request.max_tokens = self.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS);
        if self.parallel == Some(false) && self.request.tools.is_some() {
            let choice = self.request.tool_choice.get_or_insert(ToolChoice {
                kind: "auto",
                name: None,
                disable_parallel_tool_use: None,
            });
            // Anthropic takes the switch only where tools may be used.
            choice.disable_parallel_tool_use = (choice.kind != "none").then_some(true);
        }
        if self.effort.is_some() || self.format.is_some() {
            self.request.output_config = Some(OutputConfig {
                effort: self.effort,
                format: self.format,
            });
        }
        with_model(&self.model, &self.request, self.include_usage)
    }
}

/// Anthropic refuses texts of white space alone, which models write before their calls of tools.
fn text_block(text: Cow<'_, str>) -> Option<Block<'_>> {
    (!text.trim().is_empty()).then_some(Block::Text { text })
}

/// A `data:` URL in base64 as it is, any other by its address.
fn source(url: Cow<'_, str>) -> Option<Source<'_>> {
    if !url.starts_with("data:") {
        return (!url.is_empty()).then_some(Source::Url { url });
    }
    let (media_type, data) = data_url(&url)?;
    Some(Source::Base64 {
        media_type: Cow::Owned(media_type.to_owned()),
        data: Cow::Owned(data.to_owned()),
    })
}

fn tool_use<'a>(at: &str, call: ToolCallIn<'a>) -> Result<Option<Block<'a>>, Misfit> {
    let Some(function) = call.function else {
        return Ok(None);
    };
    let input = reading::arguments(at, &function.arguments)?;
    Ok(Some(Block::ToolUse {
        id: tool_id(call.id),
        name: function.name,
        input,
    }))
}

fn empty_object(text: &'static str) -> Box<RawValue> {
    RawValue::from_string(text.to_owned()).unwrap_or_default()
}

/// Anthropic has no level below `low`.
fn effort(name: &str, raw: &RawValue) -> Result<&'static str, Misfit> {
    const EXPECTED: &str = "none, minimal, low, medium, high, xhigh or max";
    match read::<Cow<'_, str>>(name, raw, EXPECTED)?.as_ref() {
        "none" | "minimal" | "low" => Ok("low"),
        "medium" => Ok("medium"),
        "high" => Ok("high"),
        "xhigh" => Ok("xhigh"),
        "max" => Ok("max"),
        _ => Err(Misfit::Invalid(name.to_owned(), EXPECTED)),
    }
}
