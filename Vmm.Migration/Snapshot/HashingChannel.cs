using System.Security.Cryptography;
using Vmm.Core.Buffers;
using Vmm.Core.Channels;
using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;

namespace Vmm.Migration.Snapshot;

/// <summary>
/// Passes a file's stream through SHA-256, reports progress, and stops when cancelled. The VM is stopped, so memory does not change between hash and
/// write.
/// </summary>
internal sealed class HashingChannel(FileChannel file, long totalBytes, Action<long, long>? progress, CancellationToken cancel) : IMigrationChannel
{
    private readonly IncrementalHash _hash = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);
    private long _done;

    public string Name => file.Name;

    public bool IsBidirectional => false;

    public bool PeerHasClosed => false;

    internal long Bytes => _done;

    internal string Finish() => $"sha256:{Convert.ToHexStringLower(_hash.GetHashAndReset())}";

    public int Read(Span<byte> destination)
    {
        int n = file.Read(destination);
        _hash.AppendData(destination[..n]);
        Count(n);
        return n;
    }

    public void Write(ReadOnlySpan<byte> source)
    {
        _hash.AppendData(source);
        file.Write(source);
        Count(source.Length);
    }

    public void WriteGather(GatherList parts)
    {
        long bytes = parts.PendingBytes;
        for (int i = 0; i < parts.Count; i++) _hash.AppendData(parts.Segment(i));
        file.WriteGather(parts);
        Count(bytes);
    }

    public void Shutdown(ChannelShutdown how) => file.Shutdown(how);

    public bool Drain(TimeSpan timeout) => file.Drain(timeout);

    /// <summary>The file stays open.</summary>
    public void Dispose() => _hash.Dispose();

    private void Count(long bytes)
    {
        _done += bytes;
        cancel.ThrowIfCancellationRequested();
        progress?.Invoke(Math.Min(_done, totalBytes), totalBytes);
    }
}
