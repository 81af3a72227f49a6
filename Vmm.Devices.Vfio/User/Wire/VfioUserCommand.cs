namespace Vmm.Devices.Vfio.User.Wire;

/// <summary>vfio-user commands (vfio-user 1).</summary>
internal enum VfioUserCommand : ushort
{
    /// <summary>Version negotiation, first message.</summary>
    Version = 1,
    /// <summary>Guest memory the server may use.</summary>
    DmaMap = 2,
    /// <summary>Withdraws guest memory from the server.</summary>
    DmaUnmap = 3,
    /// <summary>Device info.</summary>
    DeviceGetInfo = 4,
    /// <summary>Region info.</summary>
    DeviceGetRegionInfo = 5,
    /// <summary>ioeventfds of a region.</summary>
    DeviceGetRegionIoFds = 6,
    /// <summary>Interrupt info.</summary>
    DeviceGetIrqInfo = 7,
    /// <summary>Interrupt setup.</summary>
    DeviceSetIrqs = 8,
    /// <summary>Register read.</summary>
    RegionRead = 9,
    /// <summary>Register write.</summary>
    RegionWrite = 10,
    /// <summary>Server reads guest memory.</summary>
    DmaRead = 11,
    /// <summary>Server writes guest memory.</summary>
    DmaWrite = 12,
    /// <summary>Reset.</summary>
    DeviceReset = 13,
    /// <summary>Dirty log of the v1 era.</summary>
    DirtyPages = 14,
    /// <summary>Several register writes.</summary>
    RegionWriteMulti = 15,
    /// <summary>Device feature.</summary>
    DeviceFeature = 16,
    /// <summary>Reads migration data.</summary>
    MigDataRead = 17,
    /// <summary>Writes migration data.</summary>
    MigDataWrite = 18,
}
