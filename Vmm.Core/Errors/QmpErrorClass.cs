namespace Vmm.Core.Errors;

/// <summary>QMP error classes (qmp 3).</summary>
internal enum QmpErrorClass
{
    /// <summary>The class of almost all errors.</summary>
    GenericError,
    /// <summary>Unknown command; only the QMP dispatcher uses it.</summary>
    CommandNotFound,
    /// <summary>No such device.</summary>
    DeviceNotFound,
    /// <summary>The device exists but cannot serve the request in its present state.</summary>
    DeviceNotActive,
    /// <summary>The accelerator lacks a capability.</summary>
    KVMMissingCap,
}
