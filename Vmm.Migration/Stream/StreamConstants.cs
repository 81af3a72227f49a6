namespace Vmm.Migration.Stream;

/// <summary>Commands from source to destination (stream 6.1; QEMU: <c>MIG_CMD_*</c>).</summary>
internal enum MigCommand : ushort
{
    /// <summary>Illegal.</summary>
    Invalid = 0,
    /// <summary>The destination may write back.</summary>
    OpenReturnPath = 1,
    /// <summary>Answer with a PONG.</summary>
    Ping = 2,
    /// <summary>Postcopy may follow.</summary>
    PostcopyAdvise = 3,
    /// <summary>Start listening for page faults.</summary>
    PostcopyListen = 4,
    /// <summary>Start the VM.</summary>
    PostcopyRun = 5,
    /// <summary>Forget pages.</summary>
    PostcopyRamDiscard = 6,
    /// <summary>An embedded stream follows.</summary>
    Packaged = 7,
    /// <summary>COLO.</summary>
    EnableColo = 8,
    /// <summary>Recovery: go on.</summary>
    PostcopyResume = 9,
    /// <summary>Recovery: send the received bitmap.</summary>
    RecvBitmap = 10,
    /// <summary>The VM has stopped.</summary>
    SwitchoverStart = 11,
    /// <summary>vmm's own: the source has let the VM go (<see cref="FinalWord"/>).</summary>
    VmmReleased = 0x7601,
    /// <summary>vmm's own: the source keeps the VM.</summary>
    VmmWithdrawn = 0x7602,
}

/// <summary>Messages from destination to source (stream 6.2; QEMU: <c>MIG_RP_MSG_*</c>).</summary>
internal enum ReturnPathMessage : ushort
{
    /// <summary>Illegal.</summary>
    Invalid = 0,
    /// <summary>The last message; value 0 is success.</summary>
    Shut = 1,
    /// <summary>Answer to a PING.</summary>
    Pong = 2,
    /// <summary>Page request with a block name.</summary>
    ReqPagesId = 3,
    /// <summary>Page request for the same block.</summary>
    ReqPages = 4,
    /// <summary>Received bitmap follows.</summary>
    RecvBitmap = 5,
    /// <summary>Recovery acknowledged.</summary>
    ResumeAck = 6,
    /// <summary>The destination agrees to the switchover.</summary>
    SwitchoverAck = 7,
    /// <summary>
    /// vmm's own: the error record as UTF-8 JSON. Sent only after <see cref="Shut"/> with a non-zero value, where a QEMU source no longer reads.
    /// </summary>
    VmmErrorRecord = 0x7601,
}

/// <summary>
/// How two vmm agree on the final word, a command that the source sends behind the stream. The source offers it by a PING of a special value, which every
/// destination answers; only one that waits for the final word sends a second value before. QEMU takes part in neither.
/// </summary>
internal static class FinalWord
{
    /// <summary>Value of the source's PING, and of the PONG to it.</summary>
    internal const uint Offer = 0x766d6d01;

    /// <summary>Value of the PONG that a destination sends before, if it waits for the final word.</summary>
    internal const uint Accept = 0x766d6d02;
}

/// <summary>Fixed values of the framing (stream 1.1).</summary>
internal static class StreamConstants
{
    /// <summary><c>QEVM</c>.</summary>
    public const uint Magic = 0x5145564d;

    /// <summary>File version.</summary>
    public const uint Version = 3;

    /// <summary>Obsolete file version, which is refused by name.</summary>
    public const uint ObsoleteVersion = 2;
}
