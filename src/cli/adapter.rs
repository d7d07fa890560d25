//! Shared by the commands that read an adapter.

use std::path::Path;

use super::ui::Ui;
use crate::arch::config::ModelConfig;
use crate::lora::adapter::{Adapter, AdapterError};

/// The warning for an untrained adapter.
pub const CHANGES_NOTHING: &str = "the adapter changes nothing: its B is zero";

/// Reads the adapter, if one is named, and warns if it changes nothing.
pub fn read(folder: Option<&Path>, model: &ModelConfig, ui: Ui) -> Result<Option<Adapter>, AdapterError> {
    let adapter = folder.map(|folder| Adapter::read(folder, model)).transpose()?;
    if adapter.as_ref().is_some_and(Adapter::changes_nothing) {
        ui.warning(CHANGES_NOTHING);
    }
    Ok(adapter)
}
