//! The attention of each layer: its window, and whether it rotates queries and keys.

use super::error::ConfigError;
use super::keys::Keys;
use crate::arch::family::{Family, Rotary, Windows};

/// The attention of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerAttention {
    /// A token attends to itself and the `window - 1` tokens before it; if this is `None`, to all
    /// tokens before it.
    pub window: Option<u32>,
    /// Whether queries and keys are rotated by their positions.
    pub rotary: bool,
}

impl LayerAttention {
    /// The attention of each of the model's `layers`. `nested`: the keys are those of a
    /// `text_config`.
    pub(super) fn read(keys: &Keys<'_>, family: &Family, layers: u32, nested: bool) -> Result<Vec<Self>, ConfigError> {
        let rotary = rotary(keys, family, layers)?;
        let windows = windows(keys, family, &rotary, nested)?;
        Ok(windows.into_iter().zip(rotary).map(|(window, rotary)| Self { window, rotary }).collect())
    }
}

fn rotary(keys: &Keys<'_>, family: &Family, layers: u32) -> Result<Vec<bool>, ConfigError> {
    let Rotary::Listed { interval } = family.rotary else { return Ok(vec![true; layers as usize]) };
    let flag = |value: &serde_json::Value| value.as_u64().map(|n| n != 0).or(value.as_bool());
    let listed = keys.list("no_rope_layers", layers as usize, "a list with 0 or 1 for each layer", flag)?;
    let interval = keys.optional_size("no_rope_layer_interval")?.unwrap_or(interval);
    let by_interval = || (1..=layers).map(|number| !number.is_multiple_of(interval)).collect();
    let mut rotary = listed.unwrap_or_else(by_interval);
    rotary.truncate(layers as usize);
    Ok(rotary)
}

/// The window of each layer. `rotary` says which layers have a rotary embedding.
fn windows(keys: &Keys<'_>, family: &Family, rotary: &[bool], nested: bool) -> Result<Vec<Option<u32>>, ConfigError> {
    let window = |default: Option<u32>| match keys.get("sliding_window") {
        None => Ok(default),
        Some(_) => keys.optional_size("sliding_window"),
    };
    match family.windows {
        Windows::None => Ok(vec![None; rotary.len()]),
        Windows::Same => Ok(vec![window(None)?; rotary.len()]),
        // transformers ignores the list of a `text_config`.
        Windows::EveryLayer { default } if nested => Ok(vec![window(Some(default))?; rotary.len()]),
        Windows::EveryLayer { default } => {
            let window = window(Some(default))?;
            listed(keys, rotary.len(), window, |_| window.is_some())
        }
        Windows::Listed { default, first } => {
            let used = keys.flag("use_sliding_window", false)?;
            let window = if used { window(Some(default))? } else { None };
            let first = keys.optional_count("max_window_layers")?.unwrap_or(first);
            let slides = |layer: usize| window.is_some() && layer >= first as usize;
            listed(keys, rotary.len(), window, slides)
        }
        Windows::Pattern { default, interval } => {
            let window = window(Some(default))?;
            let interval = keys.optional_size("sliding_window_pattern")?.unwrap_or(interval) as usize;
            let slides = |layer: usize| !(layer + 1).is_multiple_of(interval);
            let windows = listed(keys, rotary.len(), window, slides)?;
            match window {
                None if keys.given("layer_types").is_none() && (0..rotary.len()).any(slides) => Err(keys.bad(
                    "sliding_window",
                    "a number of tokens: some layers have a window",
                    &serde_json::Value::Null,
                )),
                _ => Ok(windows),
            }
        }
        Windows::WithoutRotary => {
            let (used, window) = (keys.flag("use_sliding_window", false)?, window(None)?);
            let slides = |layer: usize| used && window.is_some() && rotary.get(layer) == Some(&false);
            listed(keys, rotary.len(), window, slides)
        }
    }
}

/// `window` for the layers that `layer_types` names, or else for those that `slides` accepts.
fn listed(
    keys: &Keys<'_>,
    layers: usize,
    window: Option<u32>,
    slides: impl Fn(usize) -> bool,
) -> Result<Vec<Option<u32>>, ConfigError> {
    const KEY: &str = "layer_types";
    const EXPECTED: &str = "a list with full_attention or sliding_attention for each layer";
    let slides_by_name = |name: &serde_json::Value| match name.as_str()? {
        "full_attention" | "attention" => Some(false),
        "sliding_attention" => Some(true),
        _ => None,
    };
    let named = keys.list(KEY, layers, EXPECTED, slides_by_name)?;
    let bad = |expected| keys.bad(KEY, expected, keys.get(KEY).unwrap_or_default());
    match &named {
        Some(named) if named.len() > layers => return Err(bad(EXPECTED)),
        Some(named) if window.is_none() && named.contains(&true) => {
            return Err(bad("full_attention for each layer: there is no sliding_window, or use_sliding_window is false"));
        }
        _ => {}
    }
    let slides = named.unwrap_or_else(|| (0..layers).map(slides).collect());
    Ok(slides.into_iter().map(|slides| window.filter(|_| slides)).collect())
}
