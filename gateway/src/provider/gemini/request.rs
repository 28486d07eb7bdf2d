//! From the body of a chat completion to Gemini's.

use std::borrow::Cow;
use std::collections::HashMap;

use serde_json::value::RawValue;

use super::{
    Blob, Call, CallResponse, Calling, Content, Declaration, Instruction, NO_SIGNATURE, Output,
    Part, Request, Thinking, ToolConfig, Tools,
};
use crate::provider::chat::{MessageIn, PartIn, ToolCallIn, ToolIn};
use crate::provider::fields::Fields;
use crate::provider::reading::{self, Choose, Form, MESSAGES, asks_for_nothing, data_url, is_hint};
use crate::provider::{Misfit, Rest, Translated, is_null, read};

/// See [`super`].
pub(in crate::provider) fn request(body: &[u8], rest: Rest) -> Result<Translated, Misfit> {
    let Fields(fields) = Fields::of(body)?;
    let mut draft = Draft {
        rest,
        request: Request::default(),
        names: HashMap::new(),
        choose: Choose::Auto,
        strict: false,
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
    /// Calls of tools by their ids: Gemini's results name the tool.
    names: HashMap<Cow<'a, str>, Cow<'a, str>>,
    choose: Choose<'a>,
    /// Some tool's arguments must keep to its schema.
    strict: bool,
    include_usage: bool,
}

impl<'a> Draft<'a> {
    /// The table of members, as docs/protocols.md has it.
    fn member(&mut self, name: &str, raw: &'a RawValue) -> Result<(), Misfit> {
        let generation = &mut self.request.generation_config;
        match name {
            "messages" => self.messages(raw)?,
            "max_completion_tokens" => {
                generation.max_output_tokens = Some(read(name, raw, "a whole number")?);
            }
            "max_tokens" => {
                let most = read(name, raw, "a whole number")?;
                generation.max_output_tokens.get_or_insert(most);
            }
            "temperature" => generation.temperature = Some(raw),
            "top_p" => generation.top_p = Some(raw),
            "top_k" => generation.top_k = Some(raw),
            "seed" => generation.seed = Some(raw),
            "presence_penalty" => generation.presence_penalty = Some(raw),
            "frequency_penalty" => generation.frequency_penalty = Some(raw),
            "n" => generation.candidate_count = Some(read(name, raw, "a whole number")?),
            "logprobs" => {
                generation.response_logprobs = Some(read(name, raw, "true or false")?);
            }
            "top_logprobs" => generation.logprobs = Some(raw),
            "stop" => generation.stop_sequences = Some(reading::stop(raw)?),
            "tools" => self.tools(raw)?,
            "tool_choice" => match reading::tool_choice(raw)? {
                Some(choose) => self.choose = choose,
                None => self.rest.leave(name)?,
            },
            "parallel_tool_calls" => {
                if !read::<bool>(name, raw, "true or false")? {
                    self.rest.leave(name)?;
                }
            }
            "response_format" => self.response_format(raw)?,
            "reasoning_effort" => {
                let effort: Cow<'_, str> = read(name, raw, "a text")?;
                generation.thinking_config = Some(thinking(&effort)?);
            }
            "service_tier" => {
                if read::<Cow<'_, str>>(name, raw, "a text")? != "auto" {
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
                    let parts = self.content(&at, message.content)?;
                    let instruction = self.request.system_instruction.take();
                    let mut all = instruction.map(|before| before.parts).unwrap_or_default();
                    all.extend(parts);
                    self.request.system_instruction =
                        (!all.is_empty()).then_some(Instruction { parts: all });
                }
                "user" => {
                    let parts = self.content(&at, message.content)?;
                    self.say("user", parts);
                }
                "assistant" => {
                    let parts = self.assistant(&at, message)?;
                    self.say("model", parts);
                }
                "tool" => {
                    let part = self.result(&at, message)?;
                    self.say("user", vec![part]);
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

    /// Neighbours of one role are one content: the results of tools must come together.
    fn say(&mut self, role: &'static str, parts: Vec<Part<'a>>) {
        match self.request.contents.last_mut() {
            _ if parts.is_empty() => {}
            Some(last) if last.role == role => last.parts.extend(parts),
            _ => self.request.contents.push(Content { role, parts }),
        }
    }

    fn content(&self, at: &str, raw: Option<&'a RawValue>) -> Result<Vec<Part<'a>>, Misfit> {
        let Some(raw) = raw.filter(|raw| !is_null(raw)) else {
            return Ok(Vec::new());
        };
        if raw.get().starts_with('"') {
            return Ok(text_part(read(at, raw, "a text")?).into_iter().collect());
        }
        let at = format!("{at}.content");
        let parts: Vec<PartIn<'a>> = read(&at, raw, "a text or a list of parts")?;
        let mut wanted = Vec::with_capacity(parts.len());
        for (index, part) in parts.into_iter().enumerate() {
            let at = format!("{at}[{index}]");
            match part.kind.as_ref() {
                "text" => wanted.extend(part.text.and_then(text_part)),
                "refusal" => wanted.extend(part.refusal.and_then(text_part)),
                "image_url" => {
                    let url = part.image_url.map(|image| image.url).unwrap_or_default();
                    match inline(&url) {
                        Some(part) => wanted.push(part),
                        // Gemini fetches nothing for its callers.
                        None => self.rest.leave(format!("{at}.image_url.url"))?,
                    }
                }
                "file" => {
                    let data = part
                        .file
                        .and_then(|file| file.file_data)
                        .unwrap_or_default();
                    match inline(&data) {
                        Some(part) => wanted.push(part),
                        None => self.rest.leave(format!("{at}.file"))?,
                    }
                }
                "input_audio" => match part.input_audio {
                    Some(audio) => wanted.push(Part::Inline {
                        inline_data: Blob {
                            mime_type: Cow::Owned(format!("audio/{}", audio.format)),
                            data: audio.data,
                        },
                    }),
                    None => self.rest.leave(format!("{at}.input_audio"))?,
                },
                _ => self.rest.leave(format!("{at}.type"))?,
            }
        }
        Ok(wanted)
    }

    fn assistant(&mut self, at: &str, message: MessageIn<'a>) -> Result<Vec<Part<'a>>, Misfit> {
        if message.audio.is_some_and(|raw| !is_null(raw)) {
            self.rest.leave(format!("{at}.audio"))?;
        }
        if message.function_call.is_some_and(|raw| !is_null(raw)) {
            self.rest.leave(format!("{at}.function_call"))?;
        }
        let mut parts = self.content(at, message.content)?;
        parts.extend(message.refusal.and_then(text_part));
        for (index, call) in message.tool_calls.into_iter().flatten().enumerate() {
            let at = format!("{at}.tool_calls[{index}]");
            match self.call(&at, call, index == 0)? {
                Some(part) => parts.push(part),
                None => self.rest.leave(at)?,
            }
        }
        Ok(parts)
    }

    /// Of calls made together the first one is signed.
    fn call(
        &mut self,
        at: &str,
        call: ToolCallIn<'a>,
        is_first: bool,
    ) -> Result<Option<Part<'a>>, Misfit> {
        let Some(function) = call.function else {
            return Ok(None);
        };
        let args = reading::arguments(at, &function.arguments)?;
        self.names.insert(call.id.clone(), function.name.clone());
        let signature = call
            .extra_content
            .and_then(|extra| extra.google?.thought_signature);
        let missing = is_first.then_some(Cow::Borrowed(NO_SIGNATURE));
        Ok(Some(Part::Call {
            function_call: Call {
                id: call.id,
                name: function.name,
                args,
            },
            thought_signature: signature.or(missing),
        }))
    }

    fn result(&self, at: &str, message: MessageIn<'a>) -> Result<Part<'a>, Misfit> {
        let known = message.tool_call_id.and_then(|id| {
            let name = self.names.get(&id)?.clone();
            Some((id, name))
        });
        let (id, name) = known.ok_or_else(|| {
            Misfit::Invalid(
                format!("{at}.tool_call_id"),
                "the id of an earlier tool call",
            )
        })?;
        let mut output = String::new();
        for part in self.content(at, message.content)? {
            match part {
                Part::Text { text } => output.push_str(&text),
                _ => self.rest.leave(format!("{at}.content"))?,
            }
        }
        let response = Output { output };
        Ok(Part::Response {
            function_response: CallResponse { id, name, response },
        })
    }

    fn tools(&mut self, raw: &'a RawValue) -> Result<(), Misfit> {
        let tools: Vec<ToolIn<'a>> = read("tools", raw, "a list of functions")?;
        let mut wanted = Vec::with_capacity(tools.len());
        for (index, tool) in tools.into_iter().enumerate() {
            let Some(function) = tool.function else {
                self.rest.leave(format!("tools[{index}].type"))?;
                continue;
            };
            self.strict |= function.strict == Some(true);
            wanted.push(Declaration {
                name: function.name,
                description: function.description,
                parameters_json_schema: function.parameters,
            });
        }
        self.request.tools = (!wanted.is_empty()).then_some([Tools {
            function_declarations: wanted,
        }]);
        Ok(())
    }

    fn response_format(&mut self, raw: &'a RawValue) -> Result<(), Misfit> {
        const JSON: &str = "application/json";
        let generation = &mut self.request.generation_config;
        match reading::response_format(raw)? {
            Some(Form::Text) => {}
            Some(Form::Object) => generation.response_mime_type = Some(JSON),
            Some(Form::Schema(schema)) => {
                generation.response_mime_type = Some(JSON);
                generation.response_json_schema = Some(schema);
            }
            None => self.rest.leave("response_format")?,
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Translated, Misfit> {
        if self.request.contents.is_empty() {
            return Err(Misfit::Invalid("messages".to_owned(), MESSAGES));
        }
        if self.request.tools.is_some() {
            let (mode, name) = match self.choose {
                Choose::None => ("NONE", None),
                // With it, arguments keep to their schemas; in the mode ANY they do anyhow.
                Choose::Auto if self.strict => ("VALIDATED", None),
                Choose::Auto => ("AUTO", None),
                Choose::Any => ("ANY", None),
                Choose::Tool(name) => ("ANY", Some([name])),
            };
            self.request.tool_config = Some(ToolConfig {
                function_calling_config: Calling {
                    mode,
                    allowed_function_names: name,
                },
            });
        }
        Translated::without_model(&self.request, self.include_usage)
    }
}

fn text_part(text: Cow<'_, str>) -> Option<Part<'_>> {
    (!text.is_empty()).then_some(Part::Text { text })
}

fn inline<'a>(url: &str) -> Option<Part<'a>> {
    let (media_type, data) = data_url(url)?;
    Some(Part::Inline {
        inline_data: Blob {
            mime_type: Cow::Owned(media_type.to_owned()),
            data: Cow::Owned(data.to_owned()),
        },
    })
}

/// Budgets as Google's own chat completions have them: <https://ai.google.dev/gemini-api/docs/openai>.
fn thinking(effort: &str) -> Result<Thinking, Misfit> {
    let thinking_budget = match effort {
        "none" => 0,
        "minimal" | "low" => 1024,
        "medium" => 8192,
        "high" | "xhigh" | "max" => 24_576,
        _ => {
            let expected = "none, minimal, low, medium, high, xhigh or max";
            return Err(Misfit::Invalid("reasoning_effort".to_owned(), expected));
        }
    };
    Ok(Thinking {
        include_thoughts: thinking_budget > 0,
        thinking_budget,
    })
}
