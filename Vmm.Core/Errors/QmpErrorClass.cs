namespace Vmm.Core.Errors;

/// <summary>QMP error classes (qmp 3).</summary>
public enum QmpErrorClass
{
    /// <summary>Almost every error.</summary>
    GenericError,
    /// <summary>Unknown command; used by the QMP dispatcher alone.</summary>
    CommandNotFound,
    /// <summary>No such device.</summary>
    DeviceNotFound,
    /// <summary>The device exists but is not in a state to serve the request.</summary>
    DeviceNotActive,
    /// <summary>The accelerator lacks a capability.</summary>
    KVMMissingCap,
}
