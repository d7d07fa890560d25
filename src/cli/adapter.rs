//! What the commands share that take an adapter.

use std::path::Path;

use super::ui::Ui;
use crate::arch::config::ModelConfig;
use crate::lora::adapter::{Adapter, AdapterError};

/// Of an adapter that was not trained.
pub const CHANGES_NOTHING: &str = "the adapter changes nothing: its B is zero";

/// Reads the adapter, where one is named, and says where it is none to speak of.
pub fn read(folder: Option<&Path>, model: &ModelConfig, ui: Ui) -> Result<Option<Adapter>, AdapterError> {
    let adapter = folder.map(|folder| Adapter::read(folder, model)).transpose()?;
    if adapter.as_ref().is_some_and(Adapter::changes_nothing) {
        ui.warning(CHANGES_NOTHING);
    }
    Ok(adapter)
}
