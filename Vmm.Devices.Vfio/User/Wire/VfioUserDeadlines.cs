namespace Vmm.Devices.Vfio.User.Wire;

/// <summary>
/// Every wait for a vfio-user peer and its end. A client's limits are options of the device, with these defaults; a peer that misses one loses the
/// connection, because a late answer could be taken for another's. docs/device-server.md has the same table for users.
/// </summary>
internal static class VfioUserDeadlines
{
    /// <summary>
    /// Client: connect, and the reply to any request (<c>x-msg-timeout</c>; QEMU's own limit). Whoever waits may hold the BQL, so this is how long a
    /// frozen server keeps vCPUs and the operator waiting; afterwards the device is lost and every request is answered at once.
    /// </summary>
    internal const int RequestMs = 5000;

    /// <summary>
    /// Client: a change of the migration state in which the server may write or check all its state (<c>x-mig-timeout</c>). Also the longest that a frozen
    /// server delays <c>migrate_cancel</c>, <c>quit</c> and SIGTERM.
    /// </summary>
    internal const int StateMs = 10_000;

    /// <summary>Server: from the connect to the last byte of VERSION. Until then a connection keeps nobody else from the device.</summary>
    internal static readonly TimeSpan Greeting = TimeSpan.FromSeconds(5);

    /// <summary>
    /// Server: a client that has begun a message, or does not take a reply, without moving a byte. Between messages it may be silent for ever. Long, because
    /// the rest of a message may come from a migration's connection.
    /// </summary>
    internal static readonly TimeSpan Stall = TimeSpan.FromSeconds(30);

    /// <summary>Server: the next client's wait for the end of a session whose client has gone.</summary>
    internal static readonly TimeSpan Succession = TimeSpan.FromSeconds(5);

    /// <summary>Server: the client's answer to DMA_READ and DMA_WRITE (QEMU's own limit in the other direction).</summary>
    internal static readonly TimeSpan DmaAnswer = TimeSpan.FromSeconds(5);

    /// <summary>Server: the device's way to be quiet, or into another state, before the request is refused (vfio-user S-31, S-34).</summary>
    internal static readonly TimeSpan Quiesce = TimeSpan.FromSeconds(3);
}
