// @generated

pub mod agent;
