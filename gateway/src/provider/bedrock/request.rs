//! From the body of a chat completion to Converse's.

use std::borrow::Cow;

use serde_json::value::RawValue;

use super::{
    Block, Document, Image, Inference, Message, Request, Schema, Source, Text, Tool, ToolChoice,
    ToolConfig, ToolResult, ToolSpec, ToolUse,
};
use crate::provider::chat::{FileIn, MessageIn, PartIn, ToolIn};
use crate::provider::fields::Fields;
use crate::provider::reading::{self, Choose, Form, MESSAGES, asks_for_nothing, data_url, is_hint};
use crate::provider::{Misfit, Rest, Translated, is_null, read};

/// A schema that takes whatever a tool is called with.
const ANY_OBJECT: &str = r#"{"type":"object"}"#;

/// See [`super`].
pub(in crate::provider) fn request(body: &[u8], rest: Rest) -> Result<Translated, Misfit> {
    let Fields(fields) = Fields::of(body)?;
    let mut draft = Draft {
        rest,
        request: Request::default(),
        inference: Inference::default(),
        tools: Vec::new(),
        choose: None,
        include_usage: false,
    };
    for (name, raw) in fields.iter().filter(|(_, raw)| !is_null(raw)) {
        draft.member(name, raw)?;
    }
    draft.finish()
}

struct Draft<'a> {
    rest: Rest,
    request: Request<'a>,
    inference: Inference<'a>,
    tools: Vec<Tool<'a>>,
    choose: Option<Choose<'a>>,
    include_usage: bool,
}

impl<'a> Draft<'a> {
    /// The table of members, as docs/protocols.md has it.
    fn member(&mut self, name: &str, raw: &'a RawValue) -> Result<(), Misfit> {
        match name {
            "messages" => self.messages(raw)?,
            "max_completion_tokens" => {
                self.inference.max_tokens = Some(read(name, raw, "a whole number")?);
            }
            "max_tokens" => {
                let most = read(name, raw, "a whole number")?;
                self.inference.max_tokens.get_or_insert(most);
            }
            "temperature" => {
                // OpenAI's range ends at 2, Converse's at 1.
                if read::<f64>(name, raw, "a number")? <= 1.0 {
                    self.inference.temperature = Some(raw);
                } else {
                    self.rest.leave(name)?;
                }
            }
            "top_p" => self.inference.top_p = Some(raw),
            "stop" => self.inference.stop_sequences = Some(reading::stop(raw)?),
            "tools" => self.tools(raw)?,
            "tool_choice" => match reading::tool_choice(raw)? {
                Some(choose) => self.choose = Some(choose),
                None => self.rest.leave(name)?,
            },
            "parallel_tool_calls" => {
                if !read::<bool>(name, raw, "true or false")? {
                    self.rest.leave(name)?;
                }
            }
            "response_format" => {
                if !matches!(reading::response_format(raw)?, Some(Form::Text)) {
                    self.rest.leave(name)?;
                }
            }
            "service_tier" => {
                let tier: Cow<'_, str> = read(name, raw, "a text")?;
                if tier != "auto" && tier != "default" {
                    self.rest.leave(name)?;
                }
            }
            "stream_options" => self.include_usage = reading::include_usage(raw)?,
            // In the path.
            "model" | "stream" => {}
            "user" | "safety_identifier" => {}
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
                    for block in self.content(&at, message.content)? {
                        match block {
                            Block::Text(text) => self.request.system.push(Text { text }),
                            _ => self.rest.leave(format!("{at}.content"))?,
                        }
                    }
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
                    let result = ToolResult {
                        tool_use_id: reading::tool_id(tool_use_id),
                        content,
                    };
                    self.say("user", vec![Block::ToolResult(result)]);
                }
                "function" => self.rest.leave(format!("{at}.role"))?,
                _ => {
                    let expected = "system, developer, user, assistant or tool";
                    return Err(Misfit::Invalid(format!("{at}.role"), expected));
                }
            }
        }
        Ok(())
    }

    /// Converse wants a user and an assistant in turn, the results of tools together.
    fn say(&mut self, role: &'static str, content: Vec<Block<'a>>) {
        match self.request.messages.last_mut() {
            _ if content.is_empty() => {}
            Some(last) if last.role == role => last.content.extend(content),
            _ => self.request.messages.push(Message { role, content }),
        }
    }

    fn content(&self, at: &str, raw: Option<&'a RawValue>) -> Result<Vec<Block<'a>>, Misfit> {
        let Some(raw) = raw.filter(|raw| !is_null(raw)) else {
            return Ok(Vec::new());
        };
        if raw.get().starts_with('"') {
            return Ok(text_block(read(at, raw, "a text")?).into_iter().collect());
        }
        let at = format!("{at}.content");
        let parts: Vec<PartIn<'a>> = read(&at, raw, "a text or a list of parts")?;
        let mut blocks = Vec::with_capacity(parts.len());
        for (index, part) in parts.into_iter().enumerate() {
            let at = format!("{at}[{index}]");
            match part.kind.as_ref() {
                "text" => blocks.extend(part.text.and_then(text_block)),
                "refusal" => blocks.extend(part.refusal.and_then(text_block)),
                "image_url" => {
                    let url = part.image_url.map(|image| image.url).unwrap_or_default();
                    match image(&url) {
                        Some(image) => blocks.push(Block::Image(image)),
                        // Converse fetches nothing for its callers.
                        None => self.rest.leave(format!("{at}.image_url.url"))?,
                    }
                }
                "file" => match part.file.and_then(document) {
                    Some(document) => blocks.push(Block::Document(document)),
                    None => self.rest.leave(format!("{at}.file"))?,
                },
                _ => self.rest.leave(format!("{at}.type"))?,
            }
        }
        Ok(blocks)
    }

    fn assistant(&self, at: &str, message: MessageIn<'a>) -> Result<Vec<Block<'a>>, Misfit> {
        if message.audio.is_some_and(|raw| !is_null(raw)) {
            self.rest.leave(format!("{at}.audio"))?;
        }
        if message.function_call.is_some_and(|raw| !is_null(raw)) {
            self.rest.leave(format!("{at}.function_call"))?;
        }
        let mut blocks = self.content(at, message.content)?;
        blocks.extend(message.refusal.and_then(text_block));
        for (index, call) in message.tool_calls.into_iter().flatten().enumerate() {
            let at = format!("{at}.tool_calls[{index}]");
            let Some(function) = call.function else {
                self.rest.leave(at)?;
                continue;
            };
            blocks.push(Block::ToolUse(ToolUse {
                tool_use_id: reading::tool_id(call.id),
                name: function.name,
                input: reading::arguments(&at, &function.arguments)?,
            }));
        }
        Ok(blocks)
    }

    fn tools(&mut self, raw: &'a RawValue) -> Result<(), Misfit> {
        let tools: Vec<ToolIn<'a>> = read("tools", raw, "a list of functions")?;
        for (index, tool) in tools.into_iter().enumerate() {
            let Some(function) = tool.function else {
                self.rest.leave(format!("tools[{index}].type"))?;
                continue;
            };
            if function.strict == Some(true) {
                self.rest.leave(format!("tools[{index}].function.strict"))?;
            }
            let json = match function.parameters {
                Some(schema) => Cow::Borrowed(schema),
                None => Cow::Owned(reading::arguments("tools", ANY_OBJECT)?),
            };
            self.tools.push(Tool {
                tool_spec: ToolSpec {
                    name: function.name,
                    description: function.description,
                    input_schema: Schema { json },
                },
            });
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Translated, Misfit> {
        if self.request.messages.is_empty() {
            return Err(Misfit::Invalid("messages".to_owned(), MESSAGES));
        }
        if self.tools.is_empty() {
            self.tools = called(&self.request.messages)?;
        }
        let has_tools = !self.tools.is_empty();
        let tool_choice = match self.choose {
            // Converse has no word for it, and demands that tools of earlier turns be named.
            Some(Choose::None) if has_tools => {
                self.rest.leave("tool_choice")?;
                None
            }
            Some(Choose::Auto) => Some(ToolChoice::Auto {}),
            Some(Choose::Any) => Some(ToolChoice::Any {}),
            Some(Choose::Tool(name)) => Some(ToolChoice::Tool { name }),
            Some(Choose::None) | None => None,
        };
        self.request.tool_config = has_tools.then_some(ToolConfig {
            tools: self.tools,
            tool_choice,
        });
        self.request.inference_config = Some(self.inference);
        Translated::without_model(&self.request, self.include_usage)
    }
}

/// The tools that were called: Converse takes no call whose tool it is not told, and callers need not offer it again.
fn called<'a>(messages: &[Message<'a>]) -> Result<Vec<Tool<'a>>, Misfit> {
    let mut tools: Vec<Tool<'a>> = Vec::new();
    for block in messages.iter().flat_map(|message| &message.content) {
        let Block::ToolUse(ToolUse { name, .. }) = block else {
            continue;
        };
        if !tools.iter().any(|tool| tool.tool_spec.name == *name) {
            let json = Cow::Owned(reading::arguments("tools", ANY_OBJECT)?);
            tools.push(Tool {
                tool_spec: ToolSpec {
                    name: name.clone(),
                    description: None,
                    input_schema: Schema { json },
                },
            });
        }
    }
    Ok(tools)
}

/// Converse refuses texts of white space alone, which models write before their calls of tools.
fn text_block(text: Cow<'_, str>) -> Option<Block<'_>> {
    (!text.trim().is_empty()).then_some(Block::Text(text))
}

fn image<'a>(url: &str) -> Option<Image<'a>> {
    let (media_type, data) = data_url(url)?;
    let format = match media_type {
        "image/png" => "png",
        "image/jpeg" => "jpeg",
        "image/gif" => "gif",
        "image/webp" => "webp",
        _ => return None,
    };
    let bytes = Cow::Owned(data.to_owned());
    Some(Image {
        format,
        source: Source { bytes },
    })
}

fn document<'a>(file: FileIn<'_>) -> Option<Document<'a>> {
    let data = file.file_data?;
    let (media_type, data) = data_url(&data)?;
    let format = match media_type {
        "application/pdf" => "pdf",
        "text/csv" => "csv",
        "text/html" => "html",
        "text/markdown" => "md",
        "text/plain" => "txt",
        _ => return None,
    };
    let bytes = Cow::Owned(data.to_owned());
    Some(Document {
        format,
        name: document_name(file.filename.as_deref().unwrap_or_default()),
        source: Source { bytes },
    })
}

/// Converse takes letters, digits, single spaces, hyphens and brackets, and demands a name.
fn document_name(name: &str) -> String {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-()[]".contains(c);
    let words = name.split(|c| !allowed(c)).filter(|word| !word.is_empty());
    let name = words.collect::<Vec<_>>().join(" ");
    if name.is_empty() {
        "document".to_owned()
    } else {
        name
    }
}
