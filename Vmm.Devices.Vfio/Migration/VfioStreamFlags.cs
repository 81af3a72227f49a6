namespace Vmm.Devices.Vfio.Migration;

/// <summary>Tags of the <c>/vfio</c> sections, be64; both protocols write the same (vfio-migration 4.1; QEMU: <c>VFIO_MIG_FLAG_*</c>).</summary>
internal static class VfioStreamFlags
{
    /// <summary>Ends a section.</summary>
    internal const ulong EndOfState = 0xffffffffef100001;

    /// <summary>The function's config state follows, then <see cref="EndOfState"/>.</summary>
    internal const ulong DevConfigState = 0xffffffffef100002;

    /// <summary>Setup; <see cref="EndOfState"/> follows.</summary>
    internal const ulong DevSetupState = 0xffffffffef100003;

    /// <summary>be64 length and as many bytes of device data; another tag follows.</summary>
    internal const ulong DevDataState = 0xffffffffef100004;

    /// <summary>The first part of the precopy data has been sent; ends a section in place of <see cref="EndOfState"/>.</summary>
    internal const ulong DevInitDataSent = 0xffffffffef100005;

    /// <summary>The config record that came over a data channel may be loaded now; ends a section.</summary>
    internal const ulong DevConfigLoadReady = 0xffffffffef100006;

    /// <summary>Every tag, for the test that none is forgotten.</summary>
    internal static IReadOnlyList<ulong> All { get; } = [EndOfState, DevConfigState, DevSetupState, DevDataState, DevInitDataSent, DevConfigLoadReady];
}
