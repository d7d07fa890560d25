//! The files of a tokenizer.

/// The files of a pack that text is tokenised by.
#[derive(Debug, Clone, Copy, Default)]
pub struct TokenizerFiles<'a> {
    /// tokenizer.json.
    pub tokenizer: &'a [u8],
    /// tokenizer_config.json.
    pub config: Option<&'a [u8]>,
    /// special_tokens_map.json. It goes before tokenizer_config.json, unless that has
    /// `added_tokens_decoder`.
    pub special_tokens_map: Option<&'a [u8]>,
    /// added_tokens.json, which is read unless tokenizer_config.json has `added_tokens_decoder`.
    pub added_tokens: Option<&'a [u8]>,
    /// chat_template.jinja, which goes before the template of tokenizer_config.json.
    pub chat_template: Option<&'a [u8]>,
    /// The files of additional_chat_templates with their names, without `.jinja`. The template
    /// `tool_use` is for conversations with tools; `default` goes before chat_template.jinja.
    pub additional_templates: &'a [(&'a str, &'a [u8])],
    /// chat_template.json, which is used if no other file has a template.
    pub processor_template: Option<&'a [u8]>,
}
