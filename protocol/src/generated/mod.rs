// @generated

pub mod agent;
pub mod storage;
