// @generated

pub mod agent;
pub mod resources;
