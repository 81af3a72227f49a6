using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;
using Vmm.Migration.Status;

namespace Vmm.Tests.Support;

/// <summary>
/// A move whose guest writes more pages than the limited bandwidth takes, so that it goes on until it is allowed to end. For RAM of <see cref="SizeBytes"/>, half
/// of it zero.
/// </summary>
internal static class XbzrleMove
{
    /// <summary>Three quarters of the pages change. A window of 100 ms takes 200 deltas of 512 bytes, so the source waits in every pass.</summary>
    internal const ulong SizeBytes = 2 << 20;

    internal static Task<MigrationStatus> Begin(TestVm source, string uri)
    {
        source.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true), new(MigrationCapability.Xbzrle, true)]);
        source.Engine.Parameters = source.Engine.Parameters with { DowntimeLimitMs = 0, MaxBandwidthBytesPerSecond = 1 << 20 };
        return source.Engine.Migrate(MigrationAddress.Parse(uri));
    }

    /// <summary>Lets the move end when pages have gone as deltas.</summary>
    internal static void FinishAfterDeltas(TestVm source)
    {
        LeakCheck.WaitFor(() => source.Engine.Query() is { Xbzrle.Pages: > 200 } or { Status: MigrationStatus.Failed or MigrationStatus.Completed }, "pages go as deltas");
        source.Engine.Parameters = source.Engine.Parameters with { DowntimeLimitMs = 1000, MaxBandwidthBytesPerSecond = 0 };
    }
}
